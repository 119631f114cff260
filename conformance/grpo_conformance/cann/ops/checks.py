"""How a kernel refuses what it does not take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
MASKS = (torch.bool, torch.uint8)
Table = dict[str, Callable[..., Any]]


def require(holds: bool, op: str, wanted: str) -> None:
    """Raises RuntimeError, as torch_npu does with what CANN says."""
    if not holds:
        raise RuntimeError(f"simulated CANN: {op}: {wanted}")


def one_dtype(op: str, tensors: Sequence[Tensor], allowed: Sequence[torch.dtype]) -> None:
    """All of one dtype, one of those allowed."""
    found = [tensor.dtype for tensor in tensors]
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    require(len(set(found)) == 1 and found[0] in allowed, op, f"one dtype of {names}, not {found}")


def unused(op: str, **given: object) -> None:
    """Arguments that this reference does not compute with."""
    for name, value in given.items():
        require(value is None, op, f"{name} is not simulated")


def wide(x: Tensor) -> Tensor:
    """In float32, in which kernels compute."""
    return x.float()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., heads * dim] as [..., heads, dim]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def pieces(x: Tensor, counts: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Stretches of these sizes, one after the other."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [x.narrow(dim, start, count) for start, count in zip(starts, counts, strict=True)]
