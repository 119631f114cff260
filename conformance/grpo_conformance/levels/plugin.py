"""Level 0: the plugin loads cheaply, declares itself soundly and refuses with reasons."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable

from grpo_core.backend import import_pointer
from grpo_core.catalogue import Offer
from grpo_core.impl import DeviceInfo, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plugins import Raised, attempt
from grpo_core.signatures import mismatch

from ..case import Case, Outcome, Target, failed, passed

BUDGET = 2.0
"""Seconds for importing a plugin and asking its hooks, over a bare interpreter's start."""
TURNS = 3
"""Imports of which the quickest counts, where the first takes too long: machines are busy, disks asleep."""
HEAVY = ("torch", "torch_npu", "triton", "transformer_engine", "flash_attn", "vllm", "megatron", "tensorflow")
PROBE = """
import json, sys, time
from grpo_core import hookspecs, impl
before = set(sys.modules)
began = time.perf_counter()
import importlib
module = importlib.import_module(sys.argv[1])
for name in dir(module):
    if name in {hooks!r}:
        list(getattr(module, name)())
print(json.dumps([time.perf_counter() - began, sorted(set(sys.modules) - before)]))
"""
ASKED = ("grpo_devices", "grpo_attention", "grpo_linear_attention", "grpo_fused_moe", "grpo_fused_ops",
         "grpo_memory", "grpo_collectives", "grpo_rollout_engines", "grpo_train_backends")  # fmt: skip


def cases(target: Target, *, quick: bool) -> Iterable[Case]:
    """Two cases for each plugin that serves the target or has failed, two for each offer."""
    here = f"{__name__}:"
    plugins = {offer.plugin for row in target.offers.values() for offer in row}
    plugins.add(target.catalogue.owners[f"device:{target.device.name}"])
    # One that could not be loaded or asked may be the one that should have served it.
    plugins.update(failure.plugin for failure in target.catalogue.failures)
    for name in sorted(plugins):
        args, subject = {"plugin": name}, f"plugin:{name}"
        yield Case(
            id=f"plugin/{name}/import",
            level=0,
            room="declarations",
            subject=subject,
            run=here + "imports",
            args=args,
        )
        yield Case(
            id=f"plugin/{name}/failures",
            level=0,
            room="declarations",
            subject=subject,
            run=here + "failures",
            args=args,
        )
    for op, row in target.offers.items():
        for offer in row:
            args = {"op": op, "offer_id": offer.id}
            name = f"plugin/{op}/{offer.id}"
            yield Case(
                id=f"{name}/declared",
                level=0,
                room="declarations",
                subject=offer.id,
                run=here + "declared",
                args=args,
            )
            yield Case(
                id=f"{name}/signature",
                level=0,
                room="declarations",
                subject=offer.id,
                run=here + "signature",
                args=args,
            )


def imports(target: Target, *, plugin: str) -> Outcome:
    """Importing the plugin and asking its hooks loads no vendor package and no torch, in little time."""
    module = next((info.module for info in target.catalogue.plugins if info.id == plugin), None)
    if module is None:
        return failed(_told(target, plugin))
    seconds, loaded, figures = 0.0, [], {}
    for turn in range(TURNS):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PROBE.replace("{hooks!r}", repr(ASKED)), module],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            return failed(f"a fresh interpreter cannot import {module}: {last[0]}")
        told, loaded = json.loads(done.stdout.splitlines()[-1])
        seconds = min(seconds, told) if turn else told
        figures = {"seconds": round(seconds, 4), "process_seconds": round(time.monotonic() - began, 3)}
        if seconds <= BUDGET:
            break
    heavy = sorted({name.partition(".")[0] for name in loaded} & set(HEAVY))
    if heavy:
        return failed(f"importing {module} and asking its hooks imports {', '.join(heavy)}", figures=figures)
    if seconds > BUDGET:
        return failed(f"importing {module} takes {seconds:.1f} s of {BUDGET:.0f} s", figures=figures)
    return passed(figures=figures)


def failures(target: Target, *, plugin: str) -> Outcome:
    """The loader recorded nothing against the plugin: names are unique, hooks known, records sound."""
    told = _told(target, plugin)
    return failed(told) if told else passed()


def _told(target: Target, plugin: str) -> str:
    """What the loader recorded against a plugin."""
    return "; ".join(str(failure) for failure in target.catalogue.failures if failure.plugin == plugin)


def declared(target: Target, *, op: str, offer_id: str) -> Outcome:
    """The contract's version is served, `when` answers with None or a reason, limits can be asked."""
    offer, contract = _offer(target, op, offer_id), CONTRACTS[op]
    impl = offer.impl
    if not contract.oldest <= impl.contract <= contract.version:
        return failed(
            f"written for contract {impl.contract}, served are {contract.oldest}..{contract.version}"
        )
    if impl.backward and not contract.backward:
        return failed("declares a backward pass that the contract does not have")
    for fact, allowed in impl.limits.items():
        asked = attempt(lambda allowed=allowed: "a value nobody allows" in allowed)  # type: ignore[misc]
        if isinstance(asked, Raised):
            return failed(f"limits[{fact!r}] raises when asked about a value it does not hold: {asked}")
        if asked:
            return failed(f"limits[{fact!r}] allows everything: leave it out")
    if impl.when is None:
        return passed()
    for device in (target.probe.info, DeviceInfo(type=target.device.type)):
        said = attempt(lambda device=device: impl.when(device, Need(op=op, facts={})))  # type: ignore[misc]
        if isinstance(said, Raised):
            return failed(f"`when` raises on a need without facts: {said}")
        if said is not None and not (isinstance(said, str) and said.strip()):
            return failed(f"`when` answers {said!r}, neither None nor a reason")
    return passed()


def signature(target: Target, *, op: str, offer_id: str) -> Outcome:
    """What the pointer leads to has the contract's signature."""
    offer, contract = _offer(target, op, offer_id), CONTRACTS[op]
    served = import_pointer(offer.impl.load)
    older = frozenset(name for name, (version, _) in contract.added.items() if offer.impl.contract < version)
    problem = mismatch(served, import_pointer(contract.protocol), contract.kind, leave_out=older)
    return failed(problem) if problem else passed()


def _offer(target: Target, op: str, offer_id: str) -> Offer:
    return next(offer for offer in target.offers[op] if offer.id == offer_id)
