"""The gated delta net for inference: a recurrent state and a window of inputs instead of a cache."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ..model.gated_delta import gated_norm, gates, heads

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import Backend
    from ..model.arch import Arch, GatedDelta
    from ..model.arithmetic import Arithmetic
    from .batch import PrefillAt, StepAt
    from .states import LayerState
    from .weights import DecoderWeights


class DeltaMixer:
    """One gated delta layer: hidden states in, value heads side by side out."""

    def __init__(
        self, spec: GatedDelta, arch: Arch, backend: Backend, weights: DecoderWeights, state: LayerState,
        prefix: str, arithmetic: Arithmetic,
    ) -> None:  # fmt: skip
        plain, linears = weights.plain, weights.linears
        self.spec = spec
        self.state = state
        self.delta = backend.gated_delta
        self.conv = backend.short_conv
        self.qkvz = linears[f"{prefix}.qkvz"].__call__
        self.ba = linears[f"{prefix}.ba"].__call__
        self.filter_CW = plain[f"{prefix}.conv.weight"]
        self.A_log_K, self.dt_bias_K = plain[f"{prefix}.A_log"], plain[f"{prefix}.dt_bias"]
        self.norm = partial(
            backend.norm.rms, w=plain[f"{prefix}.norm.weight"], eps=arch.rms_norm_eps, residual=None,
            zero_centered=False,
        )  # fmt: skip
        self.swiglu = backend.mlp.swiglu
        self.arithmetic = arithmetic
        self.scale = spec.key_head_dim**-0.5
        values = spec.num_value_heads * spec.value_head_dim
        self.split = [2 * spec.num_key_heads * spec.key_head_dim + values, values]

    def step(self, x_BC: Tensor, at: StepAt) -> Tensor:
        """The heads' outputs for one token of each sequence, [B, K * E]; moves the states on."""
        mixed_BC, z_BV = torch.split(self.qkvz(x_BC), self.split, dim=-1)
        g_BK, beta_BK = gates(self.ba(x_BC), self.A_log_K, self.dt_bias_K, self.arithmetic)
        mixed_BC = self.conv.step(mixed_BC, self.filter_CW, state_NCW=self.state.window_NCW, slots=at.rows)
        o_BKE = self.delta.step(
            *heads(self.spec, mixed_BC), g_BK, beta_BK,
            state_NKDE=self.state.delta_NKDE, slots=at.rows, scale=self.scale,
        )  # fmt: skip
        return gated_norm(self.norm(o_BKE), z_BV, self.swiglu)

    def prefill(self, x_TC: Tensor, at: PrefillAt) -> Tensor:
        """The heads' outputs for a pass, [T, K * E]; each chunk goes on from its sequence's state."""
        batch, state = at.batch, self.state
        mixed_TC, z_TV = torch.split(self.qkvz(x_TC), self.split, dim=-1)
        g_TK, beta_TK = gates(self.ba(x_TC), self.A_log_K, self.dt_bias_K, self.arithmetic)
        mixed_TC, window_SCW = self.conv.varlen(
            mixed_TC, self.filter_CW, cu_seqlens=batch.cu_seqlens, final_state=True, common=batch.common,
            initial_state_SCW=None if batch.fresh else state.window_NCW.index_select(0, at.rows),
        )  # fmt: skip
        o_TKE, delta_SKDE = self.delta.chunk(
            *heads(self.spec, mixed_TC), g_TK, beta_TK, cu_seqlens=batch.cu_seqlens, scale=self.scale,
            initial_state_SKDE=None if batch.fresh else state.delta_NKDE.index_select(0, at.rows),
            final_state=True, common=batch.common,
        )  # fmt: skip
        assert window_SCW is not None and delta_SKDE is not None
        state.window_NCW.index_copy_(0, at.rows, window_SCW)
        state.delta_NKDE.index_copy_(0, at.rows, delta_SKDE)
        return gated_norm(self.norm(o_TKE), z_TV, self.swiglu)
