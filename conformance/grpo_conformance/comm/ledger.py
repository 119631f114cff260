"""What a rank found: comparisons that hold, those that do not, and the bits for comparing ranks and runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.tolerance import place

KEPT = 3
"""Broken comparisons that are told in full."""


@dataclass(slots=True)
class Ledger:
    """Every comparison of one question on one rank."""

    count: int = 0
    broken: list[dict[str, Any]] = field(default_factory=list)
    error: float | None = None
    tolerance: float | None = None
    worst: dict[str, Any] = field(default_factory=dict)
    """Of the comparison that took the largest share of its tolerance."""
    bits: dict[str, str] = field(default_factory=dict)
    """Digest of each result by name."""

    def claim(self, name: str, holds: bool, said: object) -> None:
        """A property that holds or does not."""
        self.count += 1
        if not holds:
            self._break(name, problem=str(said))

    def exact(self, name: str, got: Tensor, wanted: Tensor) -> None:
        """Every bit, the shape, dtype and device included; `wanted` is on the host."""
        self.count += 1
        if not self._alike(name, got, wanted):
            return
        there = got.detach().cpu()
        self.keep(name, there)
        if there.numel() == 0:
            return
        off = (_bytes(there) != _bytes(wanted)).reshape(-1, there.element_size()).any(1)
        if bool(off.any()):
            self._break(name, **_place(there, wanted, int(off.int().argmax())), elements=int(off.sum()))

    def near(self, name: str, got: Tensor, wanted: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
        """Within `bound` of `wanted`, both float64 and on the host, element by element."""
        self.count += 1
        if not self._alike(name, got, wanted.to(dtype)):
            return
        there = got.detach().cpu()
        self.keep(name, there)
        if there.numel() == 0:
            return
        off = (there.double() - wanted).abs().nan_to_num(nan=torch.inf)
        share = off / bound
        at = int(share.argmax())
        error, tolerance = float(off.reshape(-1)[at]), float(bound.reshape(-1)[at])
        if self.error is None or self.tolerance is None or error / tolerance > self.error / self.tolerance:
            self.error, self.tolerance = error, tolerance
            self.worst = {"question": name, **_place(there, wanted, at)}
        if error > tolerance:
            self._break(name, **_place(there, wanted, at), elements=int((off > bound).sum()))

    def keep(self, name: str, value: Tensor) -> None:
        """Remember the bits of a result."""
        self.bits[name] = hashlib.sha256(_bytes(value).numpy().tobytes()).hexdigest()[:16]

    def told(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "count": self.count,
            "broken": self.broken,
            "error": self.error,
            "tolerance": self.tolerance,
            "worst": self.worst,
            "bits": self.bits,
        }

    def _alike(self, name: str, got: Any, wanted: Tensor) -> bool:
        if not isinstance(got, Tensor):
            self._break(name, problem=f"returned {type(got).__name__}, not a tensor")
            return False
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            found = f"{got.dtype} {list(got.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
            self._break(name, problem=found)
            return False
        return True

    def _break(self, name: str, **found: Any) -> None:
        if len(self.broken) < KEPT:
            self.broken.append({"question": name, **found})


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _place(got: Tensor, wanted: Tensor, at: int) -> dict[str, Any]:
    return {
        "at": list(place(at, got.shape)),
        "got": got.reshape(-1)[at].item(),
        "wanted": wanted.reshape(-1)[at].item(),
    }
