"""Level 1: the device itself: tensors, copies, streams and events, random numbers, determinism."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from grpo_core.impl import DeviceInfo
from grpo_core.plugins import Raised, attempt

from ..case import Case, Outcome, Target, failed, passed

DTYPES = ("bfloat16", "float16", "float32", "float64")
APART = 1000
"""Between the seeds of two draws."""


def cases(target: Target, *, quick: bool) -> Iterable[Case]:
    """A fixed list, with one case for each dtype that exists."""
    for name in ("probe", "copies", "streams", "random", "determinism", "wrong_device", "index"):
        yield Case(id=f"device/{name}", level=1, subject="device", run=f"{__name__}:{name}")
    for dtype in DTYPES:
        yield Case(
            id=f"device/tensors/{dtype}", level=1, subject="device", run=f"{__name__}:tensors",
            args={"dtype": dtype},
        )  # fmt: skip


def probe(target: Target) -> Outcome:
    """The probe says the same twice, and what it says is well-formed and agrees with torch."""
    first, second = target.device.probe(), target.device.probe()
    if first != second:
        return failed("two probes differ")
    info = first.info
    if not isinstance(info, DeviceInfo) or info.type != target.device.type or not first.reason.strip():
        return failed(f"the probe's info does not describe a device of type {target.device.type}: {info}")
    if info.count < 1 or info.memory_bytes < 0 or "float32" not in info.dtypes:
        return failed(f"count {info.count}, memory {info.memory_bytes}, dtypes {sorted(info.dtypes)}")
    device = target.device.open(0)
    if device.type != info.type:
        return failed(f"open(0) is {device}, its info says {info.type}")
    return passed()


def index(target: Target) -> Outcome:
    """Opening a device beyond the last is an error in words, and leaves the first usable."""
    device = target.device.open(0)
    if device.type == "cpu":
        return Outcome(status="not_declared", message="a host has no index")
    said = attempt(lambda: target.device.open(target.probe.info.count))
    if not isinstance(said, Raised):
        return failed(f"open({target.probe.info.count}) of {target.probe.info.count} device(s) succeeds")
    works = bool((torch.ones(2, device=target.device.open(0)) == 1).all())
    return passed() if works else failed(f"after {said}, the first device does not work")


def tensors(target: Target, *, dtype: str) -> Outcome:
    """A declared dtype holds its values and adds and multiplies as IEEE says; others are not judged."""
    if dtype not in target.probe.info.dtypes:
        return Outcome(status="not_declared", message=f"{dtype} is not among the device's dtypes")
    device, kind = target.device.open(0), getattr(torch, dtype)
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 0.0078125, 3.0, 240.0, float("inf"), float("-inf")])
    host = values.to(kind)
    there = host.to(device)
    if there.dtype != kind or there.device.type != device.type:
        return failed(f"a {dtype} tensor became {there.dtype} on {there.device}")
    for name, got, wanted in (
        ("copy", there, host),
        ("sum", there + there, host + host),
        ("product", there * there, host * host),
        ("cast", there.float(), host.float()),
        ("view", there[2:7].clone(), host[2:7]),
    ):
        if not torch.equal(got.cpu(), wanted):
            return failed(f"{name} of {dtype}: {got.cpu().tolist()} instead of {wanted.tolist()}")
    nan = torch.full((3,), float("nan"), dtype=kind, device=device)
    return passed() if bool(nan.isnan().all()) else failed(f"NaN does not survive in {dtype}")


def copies(target: Target, *, draw: int = 0) -> Outcome:
    """Round trips keep every bit: whole, strided, empty, pinned and non-blocking."""
    device = target.device.open(0)
    generator = torch.Generator().manual_seed(1 + APART * draw)
    host = torch.randint(-(2**31), 2**31 - 1, (257, 33), generator=generator, dtype=torch.int32)
    for name, part in (
        ("whole", host),
        ("strided", host[::3, 1::2]),
        ("empty", host[:0]),
        ("one", host[5, 7]),
    ):
        if not torch.equal(part.to(device).cpu(), part):
            return failed(f"a {name} tensor changes on the way there and back")
    if device.type == "cpu":
        return passed()
    pinned = host.pin_memory()
    there = pinned.to(device, non_blocking=True)
    back = torch.empty_like(host).pin_memory()
    back.copy_(there, non_blocking=True)
    target.device.synchronize()
    return passed() if torch.equal(back, host) else failed("pinned non-blocking copies lose values")


def streams(target: Target) -> Outcome:
    """Work on two streams is ordered by an event; an event, a stream or a device that was waited for has
    finished all of it, copies to the host included."""
    device = target.device.open(0)
    if device.type == "cpu":
        target.device.synchronize()
        return Outcome(status="not_declared", message="a host has no streams")
    module: Any = torch.get_device_module(device.type)
    first, second = torch.Stream(device=device), torch.Stream(device=device)
    event = torch.Event(device=device)
    x = torch.zeros(1 << 18, device=device)
    target.device.synchronize()
    with module.stream(first):
        for _ in range(50):
            x += 1
        event.record(first)
    with module.stream(second):
        second.wait_event(event)
        y = x * 2
    target.device.synchronize()
    if not bool((y == 100).all()):
        return failed(f"a second stream saw {sorted(set(y.flatten().tolist()))[:4]}")
    told = _waited_for(module, device)
    target.device.synchronize()
    return failed(told) if told else passed()


def _waited_for(module: Any, device: torch.device) -> str:
    """What was not done when a copy to the host was waited for, in words."""
    first, second = torch.Stream(device=device), torch.Stream(device=device)
    x = torch.arange(1 << 18, device=device)
    wanted = x.cpu()
    for how in ("an event", "a stream that waits for an event", "an event that says it is over"):
        event, landing = torch.Event(device=device), torch.full_like(wanted, -1).pin_memory()
        with module.stream(first):
            landing.copy_(x, non_blocking=True)
            event.record(first)
        if how == "an event":
            event.synchronize()
        elif how == "a stream that waits for an event":
            second.wait_event(event)
            second.synchronize()
        elif not event.query():
            # Too early to say; what was waited for must be told as over.
            event.synchronize()
            if not event.query():
                return "an event that was waited for says that it is not over"
        if not torch.equal(landing, wanted):
            return f"a copy to pinned memory is not there after waiting for {how}"
    return ""


def random(target: Target, *, draw: int = 0) -> Outcome:
    """The same seed and the same saved state give the same numbers; another seed gives others."""
    device = target.device.open(0)

    def numbers() -> torch.Tensor:
        return torch.rand(1000, device=device).cpu()

    seed = 7 + APART * draw
    target.device.seed(seed)
    first = numbers()
    state = target.device.rng_state()
    second = numbers()
    target.device.seed(seed)
    again, further = numbers(), [numbers() for _ in range(3)]
    target.device.set_rng_state(state)
    continued = numbers()
    target.device.seed(seed + 1)
    other = numbers()
    if not torch.equal(first, again):
        return failed("the same seed gives other numbers")
    if not torch.equal(second, continued) or not torch.equal(second, further[0]):
        return failed("a restored state does not continue where it was saved")
    if torch.equal(first, other) or torch.equal(first, second):
        return failed("another seed, or the next draw, gives the same numbers")
    if not (float(first.min()) >= 0 and float(first.max()) < 1 and abs(float(first.mean()) - 0.5) < 0.05):
        return failed(f"uniform numbers have the mean {float(first.mean())}")
    return passed()


def determinism(target: Target, *, draw: int = 0) -> Outcome:
    """With torch's deterministic flag, sums that meet in one place give the same bits every time."""
    device = target.device.open(0)
    generator = torch.Generator().manual_seed(2 + APART * draw)
    rows = torch.randn(4096, 16, generator=generator).to(device)
    where = torch.randint(0, 8, (4096,), generator=generator).to(device)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        sums = [torch.zeros(8, 16, device=device).index_add_(0, where, rows).cpu() for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(was)
    same = all(torch.equal(sums[0], other) for other in sums[1:])
    return passed() if same else failed("index_add_ differs from run to run under the deterministic flag")


def wrong_device(target: Target) -> Outcome:
    """An operand on the host next to one on the device is refused, not copied in silence."""
    device = target.device.open(0)
    if device.type == "cpu":
        return Outcome(status="not_declared", message="a host has nothing to mix with")
    there, here = torch.ones(4, 4, device=device), torch.ones(4, 4)
    try:
        there @ here
    except RuntimeError:
        return passed()
    return failed("a matrix product of a device tensor with a host tensor succeeds")
