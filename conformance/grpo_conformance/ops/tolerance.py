"""How far a result may be from the float64 oracle: derived from the reference, not tuned to an offer.

With u the unit roundoff of the dtype (2^-8 for bfloat16, 2^-11, 2^-24, 2^-53) and s the scale of the values,

    allowed = min(MULTIPLE x error of the reference, sqrt(u) s) + ROUNDINGS (u s + d)

where d is the distance between the dtype's smallest numbers.

The reference's error is measured on the same inputs in the same dtype, so that cancellation, long sums and
large scores widen the limit by what they cost. MULTIPLE pays for another order of sums and for operands
that are rounded once more on their way into a matrix unit (probabilities and their gradients), ROUNDINGS
for a last rounding that falls elsewhere. Where the reference loses half of the dtype's digits, it is the
specification that is suspect: sqrt(u) s is the most that it can excuse.

An error has two sizes, the largest and the root mean square, each with a limit of its own: the first sees
one wrong row, the second a small loss of precision everywhere. The largest of few errors varies more from
one order of sums to the next, and is allowed `LARGEST` times as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLE = 4.0
LARGEST = 2.0
ROUNDINGS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The distance of a result from the oracle in one measure."""

    measure: str
    """"largest" or "root mean square"."""
    error: float
    tolerance: float
    at: tuple[int, ...] = ()
    """Where the largest error is."""

    @property
    def share(self) -> float:
        """How much of the tolerance is taken; infinite for a NaN."""
        return self.error / self.tolerance if self.error == self.error else float("inf")


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype."""
    return float(torch.finfo(dtype).eps) / 2


def allowed(reference_error: float, scale: float, dtype: torch.dtype) -> float:
    """The formula above."""
    u = roundoff(dtype)
    smallest = float(torch.finfo(dtype).smallest_normal) * 2 * u
    excused = min(MULTIPLE * reference_error, math.sqrt(u) * scale)
    return excused + ROUNDINGS * (u * scale + smallest)


def gaps(
    got: Tensor, wanted: Tensor, reference: Tensor, dtype: torch.dtype, magnitude: float = 0.0
) -> list[Gap]:
    """Both measures of one result, all in float64 on the host; none for a tensor without elements.

    `magnitude` is the size of what a result is the difference of, where that is larger than the result
    itself. Values of the oracle that are not finite must be met exactly.
    """
    if wanted.numel() == 0:
        return []
    finite = wanted.isfinite()
    same = finite | (got == wanted) | (got.isnan() & wanted.isnan())
    if not bool(same.all()):
        at = _place((~same).double())
        return [Gap(measure="largest", error=float("nan"), tolerance=0.0, at=at)]
    off = torch.where(finite, got - wanted, 0.0).abs()
    theirs = torch.where(finite, reference - wanted, 0.0).abs()
    theirs = torch.where(theirs.isfinite(), theirs, 0.0)
    values = torch.where(finite, wanted, 0.0)
    largest = float(values.abs().max())
    mean = float(values.square().mean().sqrt())
    worst = off.nan_to_num(nan=torch.inf)
    return [
        Gap(
            measure="largest",
            error=float(off.max()),
            tolerance=LARGEST * allowed(float(theirs.max()), max(largest, magnitude), dtype),
            at=_place(worst),
        ),
        Gap(
            measure="root mean square",
            error=float(off.square().mean().sqrt()),
            tolerance=allowed(float(theirs.square().mean().sqrt()), max(mean, magnitude), dtype),
            at=_place(worst),
        ),
    ]


def place(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Indices of an element by its number. torch.unravel_index imports its compiler, for seconds."""
    found: list[int] = []
    for size in reversed(shape):
        flat, index = divmod(flat, size)
        found.append(index)
    return tuple(reversed(found))


def _place(errors: Tensor) -> tuple[int, ...]:
    return place(int(errors.argmax()), errors.shape)
