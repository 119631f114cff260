"""A linear layer whose weight is packed once in oneDNN's own layout.

The two operators belong to torch's compiler and are not public. A torch without them fails when this module
is bound, before any training, with the pin that mends it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.errors import PluginError
from grpo_core.ops.reference.fused import check_same

ROWS_HINT = 64
"""Rows of x that the packed layout is chosen for; others work too."""

if not (
    hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
):
    raise PluginError(
        "packed linear layers cannot be used with this torch",
        why=f"torch {torch.__version__} lacks mkldnn::_reorder_linear_weight or _linear_pointwise",
        fix="set ops: {linear.packed: core:reference}, or install a torch built with oneDNN",
    )


class OneDnnLinear:
    """See `grpo_core.ops.fused.PackedLinear`. Keeps the packed copy only, not the tensors given."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        # Facts for `update`: meta tensors hold no memory.
        self.like_NK = torch.empty_like(weight_NK, device="meta")
        self.bias_N = None if bias_N is None else bias_N.detach().clone()
        self.packed = pack(weight_NK)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Returns x W^T + b, [T, N]."""
        if x_TK.shape[0] == 0:
            return x_TK.new_empty(0, self.like_NK.shape[0])
        y_TN: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self.packed, self.bias_N, "none", [], "")
        return y_TN

    def update(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        """Pack new values; the old copy goes first. Raises ValueError when shape or dtype differ."""
        check_same(self.like_NK, weight_NK)
        check_same(self.bias_N, bias_N)
        self.packed = None
        self.packed = pack(weight_NK)
        if self.bias_N is not None and bias_N is not None:
            self.bias_N.copy_(bias_N)

    def nbytes(self) -> int:
        """Bytes of the packed weight and the bias; the layout may round sizes up a little."""
        return self.like_NK.nbytes + (0 if self.bias_N is None else self.bias_N.nbytes)


def pack(weight_NK: Tensor) -> Tensor:
    """The weight in oneDNN's layout for about ROWS_HINT rows of x."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous(), ROWS_HINT)
    return packed
