"""Offers that go wrong only in a whole run, wrapped around the references; run as a script on `sim`.

`python faulty_system.py FAULT CHECK KEY=VALUE...` plants a fault on the simulated device and prints the
outcome of a check of the system level as JSON.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from grpo_conformance.case import Outcome
from grpo_conformance.target import open_target
from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS
from grpo_core.ops.memory import MemoryStats
from grpo_core.ops.reference import fused, moe
from grpo_core.ops.reference.memory import HostMemory
from grpo_core.plugins import load

PAGE = 1024


class SkipsOne(fused.PlainLinear):
    """The linear that is made third keeps its first weights for ever."""

    made = 0

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__(weight_NK, bias_N)
        SkipsOne.made += 1
        self.stale = SkipsOne.made % 7 == 3

    def update(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        """Take new values, unless it is the stale one."""
        if not self.stale:
            super().update(weight_NK, bias_N)


class LosesAPage(HostMemory):
    """A page of the largest tensor of one tag wakes as zeros."""

    tag = "weights"

    def wake(self, *tags: str) -> None:
        """Wake, less a page."""
        slept = self.tag in tags and self.tag in self.asleep
        super().wake(*tags)
        if slept:
            largest = max(self.held[self.tag], key=lambda held: held.nbytes).bytes_view()
            largest[PAGE : 2 * PAGE].zero_()


class LosesAMoment(LosesAPage):
    """The same of the optimizer."""

    tag = "optimizer"


class SleepsWithOpenEyes:
    """Memory of the device that frees nothing in its sleep."""

    def __new__(cls) -> Any:
        """The device's own, with two calls that do nothing."""
        from grpo_conformance.sim.memory import SimMemory

        class Insomniac(SimMemory):
            def sleep(self, *tags: str, keep: str) -> None:
                """Nothing."""

            def wake(self, *tags: str) -> None:
                """Nothing."""

        return Insomniac()

    def stats(self) -> MemoryStats: ...  # type: ignore[empty-body]
    def reset_peak(self) -> None: ...
    def pool(self, tag: str) -> Any: ...
    def hold(self, tag: str, tensors: Any) -> None: ...
    def sleep(self, *tags: str, keep: str) -> None: ...
    def wake(self, *tags: str) -> None: ...
    def empty_cache(self) -> None: ...


@functools.wraps(fused.sample_token, assigned=())
def own_dice(logits_BV: Tensor, u_B: Tensor, **how: Any) -> Any:
    """Draws from the process's generator, which no checkpoint knows of."""
    return fused.sample_token(logits_BV, torch.rand(u_B.shape, dtype=torch.float64), **how)


@functools.wraps(fused.sample_token, assigned=())
def untempered(logits_BV: Tensor, u_B: Tensor, **how: Any) -> Any:
    """The log-prob of the sampling distribution is that of temperature 1."""
    ids_B, _, logprob1_B = fused.sample_token(logits_BV, u_B, **how)
    return ids_B, logprob1_B, logprob1_B


@functools.wraps(moe.route, assigned=())
def deaf(logits_TX: Tensor, *, ids_Tk: Tensor | None, **how: Any) -> Any:
    """Routes freely whatever is to be replayed."""
    return moe.route(logits_TX, ids_Tk=None, **how)


@functools.wraps(moe.route, assigned=())
def pretends(logits_TX: Tensor, *, ids_Tk: Tensor | None, **how: Any) -> Any:
    """Says that it replays, with the weights of its own choice."""
    weights_Tk, own_Tk = moe.route(logits_TX, ids_Tk=None, **how)
    return weights_Tk, own_Tk if ids_Tk is None else ids_Tk


@functools.wraps(moe.route, assigned=())
def numb(logits_TX: Tensor, **how: Any) -> Any:
    """No gradient flows into the router."""
    return moe.route(logits_TX.detach(), **how)


@functools.wraps(fused.adamw, assigned=())
def uncorrected(*args: Any, step: int, **how: Any) -> None:
    """Without the correction of the second moment's bias after the first step."""
    fused.adamw(*args, step=step if step == 1 else step + 1, **how)


@functools.wraps(fused.adamw, assigned=())
def forgetful(*args: Any, **how: Any) -> None:
    """Weight decay has no effect."""
    decays = how.pop("weight_decays")
    fused.adamw(*args, weight_decays=[0.0] * len(decays), **how)


@functools.wraps(fused.rms_norm, assigned=())
def crowded(x: Tensor, w: Tensor, **how: Any) -> Any:
    """A row's last bits depend on how many rows there are, though it declares otherwise."""
    y = fused.rms_norm(x, w, **how)
    factor = 1 + 2.0**-21 * (len(x) % 3)
    return (y[0] * factor, y[1]) if isinstance(y, tuple) else y * factor


FAULTS: Mapping[str, tuple[str, Any]] = {
    "skips one": ("linear.packed", SkipsOne),
    "loses a page": ("memory.allocator", LosesAPage),
    "loses a moment": ("memory.allocator", LosesAMoment),
    "frees nothing": ("memory.allocator", SleepsWithOpenEyes),
    "own dice": ("sample.token", own_dice),
    "untempered": ("sample.token", untempered),
    "deaf": ("moe.route", deaf),
    "pretends": ("moe.route", pretends),
    "numb": ("moe.route", numb),
    "uncorrected": ("optim.adamw", uncorrected),
    "forgetful": ("optim.adamw", forgetful),
    "crowded": ("norm.rms", crowded),
}


def planted(fault: str, device: str) -> Any:
    """A plugin with one offer that outranks all others."""
    op, served = FAULTS[fault]
    impl = Impl(
        op=op, name="broken", device=device, load=f"{__name__}:{served.__name__}", rank=999, backward=True,
        deterministic=True, batch_invariant=True, contract=CONTRACTS[op].version,
    )  # fmt: skip
    hook = hookimpl(lambda: (impl,))
    return type("Faulty", (), {f"grpo_{CONTRACTS[op].hook}": staticmethod(hook)})


def outcome_of(fault: str, device: str, check: str, args: Mapping[str, Any]) -> Outcome:
    """What a check of the system level says of the device with the fault; "" is the healthy device."""
    catalogue = load(extra={"faulty": planted(fault, device)} if fault else {})
    module, _, name = check.partition(":")
    function: Callable[..., Outcome] = getattr(
        importlib.import_module(f"grpo_conformance.system.{module}"), name
    )
    return function(open_target(device, catalogue), **args)


if __name__ == "__main__":
    sys.modules["faulty_system"] = sys.modules["__main__"]
    given = dict(word.split("=") for word in sys.argv[3:])
    print(json.dumps(asdict(outcome_of(sys.argv[1], "sim", sys.argv[2], given))))
