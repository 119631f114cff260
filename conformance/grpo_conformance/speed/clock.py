"""The clock: synchronised, warmed up, the median of several samples; and what a device can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from grpo_core.devices.base import Device

SAMPLE_SECONDS = 2e-3
"""A sample repeats short calls until it lasts about this long, so that the clock's own cost is lost in it."""
LEAST_SAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to measure."""

    samples: int
    seconds: float
    """For all samples of one call; slow calls get fewer, but at least LEAST_SAMPLES or one that is longer."""


USUAL = Patience(samples=7, seconds=0.2)
QUICK = Patience(samples=3, seconds=0.05)


def seconds_of(call: Callable[[], Any], device: Device, patience: Patience) -> float:
    """Median seconds of a call, all of its work done. Two calls come before: the first may build things."""
    return statistics.median(samples_of(call, device, patience))


def samples_of(call: Callable[[], Any], device: Device, patience: Patience) -> list[float]:
    """Seconds of a call, sample by sample."""
    call()
    device.synchronize()
    once = _sample(call, device, 1)
    if once >= patience.seconds:
        return [once]
    inner = max(1, int(SAMPLE_SECONDS / max(once, 1e-7)))
    found = [_sample(call, device, inner)]
    spent = found[0] * inner
    while len(found) < patience.samples and (spent < patience.seconds or len(found) < LEAST_SAMPLES):
        found.append(_sample(call, device, inner))
        spent += found[-1] * inner
    return found


def _sample(call: Callable[[], Any], device: Device, inner: int) -> float:
    began = time.perf_counter()
    for _ in range(inner):
        call()
    device.synchronize()
    return (time.perf_counter() - began) / inner


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """What the device does where nothing is in its way, measured beside an offer: the best sample of each."""

    copy: float
    """Bytes per second of a large copy, those that are read and those that are written."""
    matmul: float
    """FLOPs per second of a large square product in the dtype of the case."""


COPIED, COPIED_QUICK, COPIED_LARGE = 1 << 26, 1 << 23, 1 << 29
"""Bytes of the tensor that is copied; beyond most caches, but for a quick run."""
SQUARE, SQUARE_QUICK, SQUARE_LARGE = 768, 256, 8192
"""Rows of the matrices that are multiplied."""


def best_of(
    device: Device, place: torch.device, dtype: torch.dtype, patience: Patience, *, large: bool
) -> Best:
    """Measure a copy and a product."""
    quick = patience is QUICK
    nbytes = COPIED_LARGE if large else COPIED_QUICK if quick else COPIED
    size = SQUARE_LARGE if large else SQUARE_QUICK if quick else SQUARE
    source = torch.ones(nbytes // 4, device=place)
    goal = torch.empty_like(source)
    copied = min(samples_of(lambda: goal.copy_(source), device, patience))
    left = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype).to(place)
    out = torch.empty_like(left)
    multiplied = min(samples_of(lambda: torch.mm(left, left, out=out), device, patience))
    return Best(copy=2 * source.nbytes / copied, matmul=2.0 * size**3 / multiplied)
