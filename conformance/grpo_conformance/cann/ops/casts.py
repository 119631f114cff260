"""Casts, which torch_npu has operations of its own for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Table


def dtype_of(dtype: Any) -> torch.dtype:
    """torch's dtype of a number of ATen's."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return NUMBERS[dtype]


NUMBERS = dict(enumerate((
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32,
    torch.float64, torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8,
    torch.qint32, torch.bfloat16,
)))  # fmt: skip


def cast(input: Tensor, dtype: Any, input_dtype: Any = None) -> Tensor:
    """A copy in another dtype."""
    return input.to(dtype_of(dtype), copy=True)


def plain_cast(input: Tensor, dtype: Any) -> Tensor:
    """The same without the vendor's own numbers of dtypes."""
    return cast(input, dtype)


def cast_backward(grad: Tensor, dtype: Any, grad_dtype: Any = None, input_dtype: Any = None) -> Tensor:
    """The gradient in the dtype that the operand had."""
    return cast(grad, dtype)


def plain_cast_backward(grad: Tensor, dtype: Any) -> Tensor:
    """The same without the vendor's own numbers of dtypes."""
    return cast(grad, dtype)


TABLE: Table = {
    "npu_dtype_cast": cast,
    "_npu_dtype_cast": plain_cast,
    "npu_dtype_cast_backward": cast_backward,
    "_npu_dtype_cast_backward": plain_cast_backward,
}
