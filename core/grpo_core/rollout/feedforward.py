"""Feed-forwards for inference: dense SwiGLU, and a mixture of experts that can note its choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..model.arch import MoE
from ..model.feedforward import router_logits, routing_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from ..backend import Backend
    from ..model.arch import DenseMLP
    from ..model.arithmetic import Arithmetic
    from .weights import DecoderWeights


def swiglu(backend: Backend, weights: DecoderWeights, prefix: str) -> Callable[[Tensor], Tensor]:
    """down(swiglu(gate_up(x))) of the linears under a prefix."""
    gate_up = weights.linears[f"{prefix}.gate_up"].__call__
    down = weights.linears[f"{prefix}.down"].__call__
    op = backend.mlp.swiglu
    return lambda x_TC: down(op(gate_up(x_TC)))


def make_feedforward(
    spec: DenseMLP | MoE, backend: Backend, weights: DecoderWeights, prefix: str, *,
    place: int, router_dtype: torch.dtype, arithmetic: Arithmetic,
) -> Callable[[Tensor, Tensor | None], Tensor]:  # fmt: skip
    """A layer's feed-forward; `place` is which of the M layers with experts it is."""
    if isinstance(spec, MoE):
        return Mixture(
            spec, backend, weights, prefix, place=place, router_dtype=router_dtype, arithmetic=arithmetic
        )
    dense = swiglu(backend, weights, prefix)
    return lambda x_TC, record_TMk: dense(x_TC)


class Mixture:
    """Routed experts beside an optional shared one; the same function as the training decoder's."""

    def __init__(
        self, spec: MoE, backend: Backend, weights: DecoderWeights, prefix: str, *,
        place: int, router_dtype: torch.dtype, arithmetic: Arithmetic,
    ) -> None:  # fmt: skip
        plain = weights.plain
        self.place = place
        self.num_experts = spec.num_experts
        self.ops = backend.moe
        self.router_XC = plain[f"{prefix}.router.weight"]
        self.router_dtype, self.arithmetic = router_dtype, arithmetic
        self.settings = routing_settings(
            spec, plain[f"{prefix}.router.bias"] if spec.selection_bias else None
        )
        self.gate_up_XGC = plain[f"{prefix}.experts.gate_up.weight"]
        self.down_XCF = plain[f"{prefix}.experts.down.weight"]
        shared = bool(spec.shared_intermediate_size)
        self.shared = swiglu(backend, weights, f"{prefix}.shared") if shared else None
        self.shared_gate_1C = plain[f"{prefix}.shared_gate.weight"] if spec.shared_gate else None

    def __call__(self, x_TC: Tensor, record_TMk: Tensor | None) -> Tensor:
        """[T, C]; the experts used are written to record_TMk[:, place] where it is given."""
        y_TC, ids_Tk = self._routed(x_TC, self._logits(x_TC))
        if record_TMk is not None:
            record_TMk[:, self.place].copy_(ids_Tk)
        if self.shared is None:
            return y_TC
        shared_TC = self.shared(x_TC)
        if self.shared_gate_1C is not None:
            shared_TC = shared_TC * self.arithmetic.sigmoid(self.arithmetic.linear(x_TC, self.shared_gate_1C))
        return y_TC + shared_TC

    def _logits(self, x_TC: Tensor) -> Tensor:
        return router_logits(x_TC, self.router_XC, self.router_dtype, self.arithmetic)

    def _routed(self, x_TC: Tensor, logits_TX: Tensor) -> tuple[Tensor, Tensor]:
        ops, gate_up_XGC, down_XCF = self.ops, self.gate_up_XGC, self.down_XCF
        if ops.layer is not None:
            return ops.layer(x_TC, logits_TX, gate_up_XGC, down_XCF, **self.settings, ids_Tk=None, group=None)
        weights_Tk, ids_Tk = ops.route(logits_TX, **self.settings, ids_Tk=None)
        rows_RC, counts_X, record = ops.dispatch(x_TC, ids_Tk, num_experts=self.num_experts, group=None)
        rows_RC = ops.experts(rows_RC, gate_up_XGC, down_XCF, counts_X)
        return ops.combine(rows_RC, weights_Tk, record), ids_Tk
