"""Level 3: the allocator's account is true, sleep frees and wake restores, running out is survived."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from grpo_core.backend import import_pointer
from grpo_core.ops.memory import Memory

from ..case import Case, Outcome, Target, failed, passed

OP = "memory.allocator"
ALONE = ("peaks", "out_of_memory", "leaks")
CHECKS = ("accounts", "tags", "refusals", *ALONE)
KEEPS = ("host", "disk", "none")
SIZES = ((1000, 1000), (7,), (3, 5, 11))
ROUNDS = 200
SLACK = 32 << 20
"""Bytes that a process may grow by in `ROUNDS` rounds of 4 MB: far below one leaked round in ten."""


def cases(target: Target, *, quick: bool) -> Iterable[Case]:
    """The same list for every offer of `memory.allocator`, the sleeping places in each dtype's storage."""
    for offer in target.offers.get(OP, ()):
        base = {"offer_id": offer.id}
        for keep in KEEPS:
            yield Case(
                id=f"memory/{offer.id}/sleep/{keep}", level=3, subject=offer.id, run=f"{__name__}:sleeps",
                args=base | {"keep": keep},
            )  # fmt: skip
        for name in CHECKS:
            yield Case(
                id=f"memory/{offer.id}/{name}", level=3, subject=offer.id, args=base,
                run=f"{__name__}:{name}",
                alone=name in ALONE,
            )  # fmt: skip


def accounts(target: Target, *, offer_id: str) -> Outcome:
    """What is held is counted once under its tag, views and shared storages included."""
    memory, device = _open(target, offer_id)
    tensors = _tensors(device)
    before = memory.stats().allocated
    memory.hold("a", tensors)
    memory.hold("b", [tensors[0].new_ones(100), torch.empty(0, device=device)])
    memory.hold("a", [tensors[0][10:20]])
    stats = memory.stats()
    wanted = sum(x.untyped_storage().nbytes() for x in tensors)
    if stats.by_tag.get("a") != wanted:
        return failed(f"tag a holds {wanted} bytes and {stats.by_tag.get('a')} are told")
    grown = stats.allocated - before
    if device.type == "cpu" and grown != sum(stats.by_tag.values()):
        return failed(f"{sum(stats.by_tag.values())} bytes are held and allocated grew by {grown}")
    if stats.reserved < stats.allocated or stats.peak < stats.allocated:
        return failed(f"allocated {stats.allocated}, reserved {stats.reserved}, peak {stats.peak}")
    return passed(figures={"allocated": float(stats.allocated), "reserved": float(stats.reserved)})


def peaks(target: Target, *, offer_id: str) -> Outcome:
    """The peak sees a tensor that came and went, and a reset forgets it."""
    memory, device = _open(target, offer_id)
    if offer_id == "core:reference" and device.type != "cpu":
        return Outcome(status="not_declared", message="core's own counts the memory of the host")
    low = memory.stats().peak
    size = 256 << 20
    torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target.device.synchronize()
    high = memory.stats().peak
    memory.empty_cache()
    memory.reset_peak()
    after = memory.stats().peak
    # A process's peak counts what else it does meanwhile, and was above its present size before.
    if not 0.75 * size <= high - low <= 1.5 * size:
        return failed(f"the peak grew by {high - low} bytes for a tensor of {size}")
    if after >= high:
        return failed(f"a reset leaves the peak at {after} of {high}")
    return passed(figures={"grown": float(high - low)})


def tags(target: Target, *, offer_id: str) -> Outcome:
    """A pool can be entered, also twice and nested; tags sleep and wake one by one."""
    memory, device = _open(target, offer_id)
    with memory.pool("outer"):
        first = torch.ones(1000, device=device)
        with memory.pool("inner"):
            second = torch.ones(1000, device=device)
    memory.hold("one", [first])
    memory.hold("two", [second])
    memory.sleep("one", keep="host")
    # A storage of nothing is not read: that may end the process.
    if not second.untyped_storage().nbytes() or not bool((second == 1).all()):
        return failed("tag two sleeps or is touched when tag one goes to sleep")
    if memory.stats().by_tag["two"] == 0:
        return failed("the account of tag two is empty when tag one sleeps")
    if memory.stats().by_tag["one"] != 0 or "one" not in memory.stats().asleep:
        return failed(f"tag one sleeps and its account is {memory.stats()}")
    memory.sleep("one", keep="host")
    memory.wake("one", "two")
    memory.wake("one")
    return passed() if bool((first == 1).all()) else failed("sleeping twice loses the content")


def sleeps(target: Target, *, offer_id: str, keep: str, draw: int = 0) -> Outcome:
    """Sleep empties storages under the same tensors; wake brings every bit back, or zeros for "none"."""
    memory, device = _open(target, offer_id)
    tensors = _tensors(device, draw)
    view = tensors[0][5:50:3]
    parameter = torch.nn.Parameter(tensors[1].float())
    before = [x.detach().cpu().clone() for x in (*tensors, view, parameter)]
    ids = [id(x) for x in tensors]
    memory.hold("w", [*tensors, parameter])
    held = memory.stats().allocated
    memory.sleep("w", keep=keep)  # type: ignore[arg-type]
    if any(x.untyped_storage().nbytes() for x in (*tensors, parameter)):
        return failed("a sleeping tensor keeps its storage")
    if memory.stats().allocated >= held:
        return failed(f"{held} bytes before the sleep, {memory.stats().allocated} in it")
    memory.wake("w")
    after = [*tensors, view, parameter]
    if [id(x) for x in tensors] != ids:
        return failed("other tensor objects wake")
    for index, (x, wanted) in enumerate(zip(after, before, strict=True)):
        right = torch.zeros_like(wanted) if keep == "none" else wanted
        if x.detach().cpu().view(torch.uint8).tolist() != right.contiguous().view(torch.uint8).tolist():
            return failed(f"tensor {index} of {len(after)} wakes with another content")
    return passed()


def out_of_memory(target: Target, *, offer_id: str) -> Outcome:
    """Asking for too much raises `torch.OutOfMemoryError`, and the process goes on."""
    memory, device = _open(target, offer_id)
    if device.type == "cpu":
        return Outcome(status="not_declared", message="a host swaps and kills, it does not refuse")
    capacity = target.probe.info.memory_bytes or (1 << 46)
    kept = torch.full((1000,), 3.0, device=device)
    for _ in range(3):
        try:
            torch.empty(2 * capacity, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            continue
        return failed(f"{2 * capacity} bytes of {capacity} were given")
    memory.empty_cache()
    works = float((torch.ones(1000, device=device) + kept).sum())
    return passed() if works == 4000.0 else failed(f"after it, 1000 times 1 + 3 is {works}")


def leaks(target: Target, *, offer_id: str) -> Outcome:
    """200 rounds of taking, holding nothing, sleeping and waking leave no memory behind."""
    memory, device = _open(target, offer_id)
    held = torch.ones(1 << 20, device=device)
    memory.hold("w", [held])

    def one() -> None:
        x = torch.ones(1 << 20, device=device)
        (x * 2).sum().item()
        memory.sleep("w", keep="host")
        memory.wake("w")

    for _ in range(20):
        one()
    memory.empty_cache()
    before = memory.stats()
    for _ in range(ROUNDS):
        one()
    target.device.synchronize()
    memory.empty_cache()
    after = memory.stats()
    if after.allocated != before.allocated:
        return failed(f"allocated went from {before.allocated} to {after.allocated} in {ROUNDS} rounds")
    grown = after.reserved - before.reserved
    if grown > SLACK:
        return failed(f"{grown} bytes more are reserved after {ROUNDS} rounds")
    return passed(figures={"reserved_growth": float(grown)})


def refusals(target: Target, *, offer_id: str) -> Outcome:
    """Unknown tags and places are ValueErrors that change nothing."""
    memory, device = _open(target, offer_id)
    x = torch.ones(10, device=device)
    memory.hold("w", [x])
    attempts: tuple[tuple[str, Any], ...] = (
        ("sleep of an unknown tag", lambda: memory.sleep("nobody", keep="host")),
        ("wake of an unknown tag", lambda: memory.wake("nobody")),
        ("sleep at an unknown place", lambda: memory.sleep("w", keep="attic")),  # type: ignore[arg-type]
        ("a storage under two tags", lambda: memory.hold("v", [x])),
    )
    for what, call in attempts:
        try:
            call()
        except ValueError:
            continue
        return failed(f"{what} is accepted")
    return passed() if bool((x == 1).all()) else failed("a refused call changed a held tensor")


def _open(target: Target, offer_id: str) -> tuple[Memory, torch.device]:
    offer = next(offer for offer in target.offers[OP] if offer.id == offer_id)
    device = target.device.open(0)
    memory: Memory = import_pointer(offer.impl.load)()
    return memory, device


def _tensors(device: torch.device, draw: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3 + 1000 * draw)
    made = [torch.randn(size, generator=generator) for size in SIZES]
    return [made[0].to(device), made[1].to(torch.bfloat16).to(device), made[2].to(device)]
