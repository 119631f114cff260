"""The arithmetic between the bound ops, which mixers and feed-forwards of trainer and rollout share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.reference import rowwise

if TYPE_CHECKING:
    from ..backend import Backend

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Elementwise functions, and products with the small matrices of gates and routers."""

    sigmoid: Function
    softplus: Function
    linear: Callable[[Tensor, Tensor], Tensor]
    """(x_TK, weight_NK) -> x W^T [T, N]"""


FAST = Arithmetic(sigmoid=torch.sigmoid, softplus=F.softplus, linear=F.linear)


def arithmetic(backend: Backend, *, consistent: bool) -> Arithmetic:
    """torch's own functions, or those whose value for a row does not depend on the rows beside it."""
    if not consistent:
        return FAST
    dense = backend.linear.dense
    return Arithmetic(
        sigmoid=rowwise.sigmoid,
        softplus=rowwise.softplus,
        linear=lambda x_TK, weight_NK: dense(x_TK, weight_NK, None, main_grad_NK=None),
    )
