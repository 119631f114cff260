"""Contracts of a mixture of experts: route, dispatch, experts, combine, and the four in one.

T tokens, X experts, k experts of a token, C hidden size, F an expert's intermediate size, R rows: one for
each (token, expert) pair that this rank computes, sorted by expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class MoeRoute(Protocol):
    """Which experts compute a token, and their weights. Differentiable in the logits through the weights."""

    def __call__(
        self,
        logits_TX: Tensor,
        *,
        top_k: int,
        score: str,
        bias_X: Tensor | None,
        num_groups: int,
        topk_groups: int,
        norm: bool,
        scale: float,
        ids_Tk: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (weights_Tk in the logits' dtype, ids_Tk int64), largest selection score first.

        logits are float32 or float64. score "sigmoid" (DeepSeek-V3, arXiv 2412.19437) or "softmax". The
        selection adds `bias_X` (float32) to the scores, which the weights do not see. With num_groups > 1
        only experts of the `topk_groups` best groups can be chosen; a group is worth the sum of its two
        largest selection scores. `norm` divides the chosen scores by their sum (+ 1e-20 for sigmoid);
        `scale` multiplies the weights. Ties go to the lowest id.

        `ids_Tk` fixes the choice (routing replay): a row of non-negative ids is taken as it is, in its
        order, a row of -1 is routed freely; the weights always come from these logits.
        """
        ...


class MoeDispatch(Protocol):
    """Rows sorted by expert, on the rank that owns it. Differentiable in x."""

    def __call__(
        self, x_TC: Tensor, ids_Tk: Tensor, *, num_experts: int, group: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Returns (rows_RC, counts int64 [experts of this rank], a record for `combine`).

        `group` is an expert-parallel group of `comm.collectives` (rank r owns the r-th contiguous block of
        experts; uneven all-to-all), or None for a single rank. Rows of an expert keep the tokens' order.
        Dispatch and combine of one backend belong together: the record is their own.
        """
        ...


class MoeExperts(Protocol):
    """Grouped SwiGLU feed-forward. Differentiable in rows and both weights."""

    def __call__(
        self,
        rows_RC: Tensor,
        gate_up_XGC: Tensor,
        down_XCF: Tensor,
        counts_X: Tensor,
        *,
        main_grad_gate_up_XGC: Tensor | None = None,
        main_grad_down_XCF: Tensor | None = None,
    ) -> Tensor:
        """Returns rows_RC: down[x] (silu(gate[x] row) * (up[x] row)) of the expert x of each row.

        gate_up is [X, 2F, C] (gate, then up), down [X, C, F], both in the rows' dtype; counts_X int64 adds
        up to R. An expert without rows has a gradient of zeros, or none. The main grads (float32, contiguous)
        take the gradients of the weights, as `DenseLinear` says; each may be given alone.
        """
        ...


class MoeCombine(Protocol):
    """The weighted sum of a token's rows. Differentiable in rows and weights."""

    def __call__(self, rows_RC: Tensor, weights_Tk: Tensor, record: Any) -> Tensor:
        """Returns y_TC in the rows' dtype; products and sums in float32."""
        ...


class MoeLayer(Protocol):
    """Route, dispatch, experts and combine in one call."""

    def __call__(
        self,
        x_TC: Tensor,
        logits_TX: Tensor,
        gate_up_XGC: Tensor,
        down_XCF: Tensor,
        *,
        top_k: int,
        score: str,
        bias_X: Tensor | None,
        num_groups: int,
        topk_groups: int,
        norm: bool,
        scale: float,
        ids_Tk: Tensor | None,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns (y_TC, ids_Tk int64); arguments as in the four parts. Differentiable as they are."""
        ...
