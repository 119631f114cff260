"""Inputs by seed, which every rank knows of every other, and how far a sum over ranks may be off.

Adding n numbers takes n - 1 roundings in whatever order, so that with u the unit roundoff of the dtype

    |got - sum| <= g(n - 1) sum |x|,    g(k) = k u / (1 - k u)

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, equation 4.4); sums in a wider dtype
that are rounded once are nearer. A native average scales before or after: n + 1 roundings, over n. For
float64 the oracle, an exact sum, is rounded itself: one more. Each rounding may also lose half of the
distance of the dtype's smallest numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.tolerance import roundoff

INTEGERS = ("int64", "int32")
"""Integer dtypes that are reduced."""
MOVED = (*INTEGERS, "uint8", "bool")
"""Dtypes besides the device's own that are moved."""
WIDTH = {"int64": 60, "int32": 28, "uint8": 8, "bool": 1}
"""Bits of integers such that four of them add up without overflow, and not in a float."""


def draw(seed: int, rank: int, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
    """The input of a rank, on the host: floats over 13 binary orders of magnitude, integers of full width."""
    key = zlib.crc32(f"{seed}/{rank}/{name}/{dtype}".encode())
    generator = torch.Generator().manual_seed(key)
    kind: torch.dtype = getattr(torch, dtype)
    size = tuple(shape)
    if dtype in WIDTH:
        low = 0 if dtype in ("uint8", "bool") else -(1 << WIDTH[dtype])
        return torch.randint(low, 1 << WIDTH[dtype], size, generator=generator).to(kind)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    orders = torch.randint(-6, 7, size, generator=generator).double()
    return (values * 2.0**orders).to(kind)


def with_specials(x: Tensor) -> Tensor:
    """The same with a NaN, infinities and a negative zero among the first elements, for moving."""
    if x.is_floating_point() and x.numel() >= 4:
        x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0]).to(x.dtype)
    return x


def reduced(parts: Sequence[Tensor], op: str) -> Tensor:
    """The right answer: float64 for a sum or an average of floats, else the dtype's own and exact."""
    stack = torch.stack(list(parts))
    if op in ("max", "min"):
        return stack.amax(0) if op == "max" else stack.amin(0)
    if not stack.is_floating_point():
        return stack.sum(0, dtype=stack.dtype)
    if stack.dtype == torch.float64 and stack.numel():
        columns = stack.reshape(len(stack), -1).t().tolist()
        total = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
        total = total.reshape(stack.shape[1:])
    else:
        total = stack.double().sum(0)
    return total / len(stack) if op == "avg" else total


def bound(parts: Sequence[Tensor], op: str) -> Tensor:
    """float64: the formula above for each element."""
    n, dtype = len(parts), parts[0].dtype
    u = roundoff(dtype)
    k = (n + 1 if op == "avg" else n - 1) + (dtype == torch.float64)
    total = torch.stack([part.double().abs() for part in parts]).sum(0)
    smallest = float(torch.finfo(dtype).smallest_normal) * 2 * u
    wide = k * u / (1 - k * u) * (total / n if op == "avg" else total)
    # One rank adds nothing up: a bound above zero keeps the share of an exact result defined.
    return wide + max(k, 1) * smallest
