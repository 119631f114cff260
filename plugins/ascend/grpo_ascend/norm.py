"""RMS norm with `npu_rms_norm`, which autograd knows."""

from __future__ import annotations

from typing import Any

import torch_npu
from torch import Tensor


def rms_norm(x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool) -> Any:
    """See `grpo_core.ops.fused.RmsNorm`.

    The residual is added before: the vendor's fused add has other bits in other batches. The vendor wants
    weights in the dtype of x, where 1 + w would be rounded: that goes through float32.
    """
    total = x if residual is None else x + residual
    y = _normed(total, w, eps, zero_centered)
    return y if residual is None else (y, total)


def _normed(x: Tensor, w: Tensor, eps: float, zero_centered: bool) -> Tensor:
    if not x.numel():
        return x * w
    if not zero_centered and w.dtype == x.dtype:
        y: Tensor = torch_npu.npu_rms_norm(_matrix(x), w, epsilon=eps)[0]
        return y.view(x.shape)
    wide_w = 1 + w.float() if zero_centered else w.float()
    wide: Tensor = torch_npu.npu_rms_norm(_matrix(x.float()), wide_w, epsilon=eps)[0]
    return wide.to(x.dtype).view(x.shape)


def _matrix(x: Tensor) -> Tensor:
    """The op takes two dimensions or more."""
    return x.reshape(-1, x.shape[-1])
