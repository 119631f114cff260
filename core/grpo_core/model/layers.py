"""What mixers and feed-forwards of the training decoder are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..backend import Backend
    from ..ops.common import Common
    from ..ops.fused import DenseLinear, RmsNorm
    from .arch import Arch
    from .arithmetic import Arithmetic
    from .segments import Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the packed tokens of one forward pass are cut into segments."""

    cu_seqlens: Tensor
    """int32 [S + 1]"""
    parents: Tensor | None
    """int32 [S], or None where every segment stands alone."""
    max_seqlen: int
    tree: Tree | None = None
    """The same parents for layers with a recurrent state; None without either."""
    common: Common | None = None
    """The same on the host."""


class Linear(nn.Module):
    """x W^T + b on `linear.dense`, [T, columns] -> [T, rows]; parameters start uninitialised."""

    main_grad: Tensor | None = None
    """float32 [rows, columns]; a trainer may set it to take the weight's gradient there."""

    def __init__(
        self, rows: int, columns: int, *, bias: bool, dense: DenseLinear, device: torch.device,
        dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__()
        self.dense = dense
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None

    def forward(self, x_TK: Tensor) -> Tensor:
        return self.dense(x_TK, self.weight, self.bias, main_grad_NK=self.main_grad)


class Weight(nn.Module):
    """A parameter under the name `weight`, uninitialised: a table, a filter, the experts' matrices."""

    main_grad: Tensor | None = None
    """As `Linear.main_grad`; whoever reads the weight passes it on, or lets autograd have the gradient."""

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


class Norm(nn.Module):
    """RMSNorm over the last dimension on `norm.rms`, alone or fused with the sum of the residual stream."""

    def __init__(
        self, size: int, *, eps: float, zero_centered: bool, rms: RmsNorm, device: torch.device,
        dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__()
        self.eps, self.zero_centered, self.rms = eps, zero_centered, rms
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The normed x, of its shape."""
        y: Tensor = self.rms(x, self.weight, eps=self.eps, residual=None, zero_centered=self.zero_centered)
        return y

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normed sum, sum) of x and the residual; x alone where there is none yet."""
        if residual is None:
            return self(x), x
        both: tuple[Tensor, Tensor] = self.rms(
            x, self.weight, eps=self.eps, residual=residual, zero_centered=self.zero_centered
        )
        return both


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Makes the pieces of one decoder: all on one device, in one dtype, on the same bound ops."""

    arch: Arch
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    router_dtype: torch.dtype
    arithmetic: Arithmetic

    def linear(self, rows: int, columns: int, *, bias: bool = False) -> Linear:
        """A linear layer from `columns` to `rows` features."""
        return Linear(
            rows, columns, bias=bias, dense=self.backend.linear.dense, device=self.device, dtype=self.dtype
        )

    def weight(self, *shape: int) -> Weight:
        """A parameter of a shape."""
        return Weight(*shape, device=self.device, dtype=self.dtype)

    def norm(self, size: int, *, eps: float | None = None, zero_centered: bool | None = None) -> Norm:
        """A norm as the arch has them, where nothing else is said."""
        return Norm(
            size,
            eps=self.arch.rms_norm_eps if eps is None else eps,
            zero_centered=self.arch.zero_centered_norm if zero_centered is None else zero_centered,
            rms=self.backend.norm.rms,
            device=self.device,
            dtype=self.dtype,
        )
