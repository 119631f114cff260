"""Feed-forwards of the training decoder: SwiGLU, and a mixture of SwiGLU experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.reference import moe as reference
from .arch import Layer, MoE
from .arithmetic import Arithmetic
from .layers import Maker


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What is known before and wanted after of a layer's choice of experts; views of all layers' tensors."""

    ids_Tk: Tensor | None
    """int16; the experts to use, rows of -1 are routed freely. None routes all."""
    record_Tk: Tensor | None
    """int16; the experts used are written here."""
    free_Tk: Tensor | None = None
    """int16; the experts that would be used without `ids_Tk` are written here."""


def make_feedforward(layer: Layer, make: Maker) -> nn.Module:
    """The module of a layer's feed-forward; a `Mixture` takes its `Routing` besides the hidden [T, C]."""
    if isinstance(layer.ffn, MoE):
        return Mixture(layer.ffn, make)
    return SwiGLU(layer.ffn.intermediate_size, make, bias=layer.ffn.bias)


class SwiGLU(nn.Module):
    """SwiGLU feed-forward: hidden [T, C] -> [T, C]."""

    def __init__(self, intermediate_size: int, make: Maker, *, bias: bool = False):
        super().__init__()
        self.backend = make.backend
        self.gate_up = make.linear(2 * intermediate_size, make.arch.hidden_size, bias=bias)
        self.down = make.linear(make.arch.hidden_size, intermediate_size, bias=bias)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.down(self.backend.mlp.swiglu(self.gate_up(x_TC)))  # type: ignore[no-any-return]


class Router(nn.Module):
    """Logits of the experts, and the bias of their selection (frozen: a buffer and not a parameter)."""

    def __init__(self, spec: MoE, make: Maker):
        super().__init__()
        self.dtype, self.arithmetic = make.router_dtype, make.arithmetic
        self.weight = make.weight(spec.num_experts, make.arch.hidden_size).weight
        if spec.selection_bias:
            bias_X = torch.zeros(spec.num_experts, device=make.device, dtype=torch.float32)
            self.register_buffer("bias", bias_X)
        else:
            self.bias = None

    def forward(self, x_TC: Tensor) -> Tensor:
        return router_logits(x_TC, self.weight, self.dtype, self.arithmetic)


class Experts(nn.Module):
    """The matrices of all experts: gate_up [X, 2F, C] and down [X, C, F]."""

    def __init__(self, spec: MoE, make: Maker):
        super().__init__()
        hidden, inner = make.arch.hidden_size, spec.intermediate_size
        self.gate_up = make.weight(spec.num_experts, 2 * inner, hidden)
        self.down = make.weight(spec.num_experts, hidden, inner)


class Mixture(nn.Module):
    """Routed experts beside an optional shared one: hidden [T, C] -> [T, C]."""

    def __init__(self, spec: MoE, make: Maker):
        super().__init__()
        self.spec, self.backend, self.arithmetic = spec, make.backend, make.arithmetic
        self.router = Router(spec, make)
        self.experts = Experts(spec, make)
        if spec.shared_intermediate_size:
            self.shared = SwiGLU(spec.shared_intermediate_size, make)
        if spec.shared_gate:
            self.shared_gate = make.linear(1, make.arch.hidden_size)

    def forward(self, x_TC: Tensor, routing: Routing) -> Tensor:
        ids_Tk = None if routing.ids_Tk is None else routing.ids_Tk.long()
        logits_TX = self.router(x_TC)
        y_TC, ids_Tk = self._routed(x_TC, logits_TX, ids_Tk)
        if routing.record_Tk is not None:
            routing.record_Tk.copy_(ids_Tk)
        if routing.free_Tk is not None:
            routing.free_Tk.copy_(self._chosen(logits_TX.detach()))
        if not self.spec.shared_intermediate_size:
            return y_TC
        shared_TC: Tensor = self.shared(x_TC)
        if self.spec.shared_gate:
            shared_TC = shared_TC * self.arithmetic.sigmoid(self.shared_gate(x_TC))
        return y_TC + shared_TC

    def _routed(self, x_TC: Tensor, logits_TX: Tensor, ids_Tk: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y_TC, ids_Tk int64) of the routed experts."""
        spec, ops = self.spec, self.backend.moe
        gate_up_XGC, down_XCF = self.experts.gate_up.weight, self.experts.down.weight
        settings = routing_settings(spec, self.router.bias)
        if ops.layer is not None:
            return ops.layer(x_TC, logits_TX, gate_up_XGC, down_XCF, **settings, ids_Tk=ids_Tk, group=None)
        weights_Tk, ids_Tk = ops.route(logits_TX, **settings, ids_Tk=ids_Tk)
        rows_RC, counts_X, record = ops.dispatch(x_TC, ids_Tk, num_experts=spec.num_experts, group=None)
        rows_RC = ops.experts(
            rows_RC, gate_up_XGC, down_XCF, counts_X,
            main_grad_gate_up_XGC=self.experts.gate_up.main_grad,
            main_grad_down_XCF=self.experts.down.main_grad,
        )  # fmt: skip
        return ops.combine(rows_RC, weights_Tk, record), ids_Tk

    def _chosen(self, logits_TX: Tensor) -> Tensor:
        """int64 [T, k]; the experts that these logits alone choose."""
        # A plan with moe.layer leaves the four parts out.
        route = self.backend.moe.route if self.backend.moe.layer is None else reference.route
        return route(logits_TX, **routing_settings(self.spec, self.router.bias), ids_Tk=None)[1]


def router_logits(x_TC: Tensor, weight_XC: Tensor, dtype: torch.dtype, arithmetic: Arithmetic) -> Tensor:
    """x W^T [T, X] in float32 or float64 whatever the dtypes of x and W, for trainer and rollout alike.

    In a lower precision near ties fall differently from one batch to the next.
    """
    return arithmetic.linear(x_TC.to(dtype), weight_XC.to(dtype))


def routing_settings(spec: MoE, bias_X: Tensor | None) -> dict[str, Any]:
    """The keyword arguments of `moe.route` and `moe.layer` that a layer fixes."""
    return {
        "top_k": spec.top_k,
        "score": spec.score,
        "bias_X": bias_X,
        "num_groups": spec.num_groups,
        "topk_groups": spec.topk_groups,
        "norm": spec.norm_topk_prob,
        "scale": spec.scale,
    }
