"""The gated delta net of the training decoder (Yang et al. 2024, arXiv 2412.06464; Qwen3-Next)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .arch import GatedDelta
from .arithmetic import Arithmetic
from .layers import Maker, Packing
from .segments import Tree

if TYPE_CHECKING:
    from ..ops.common import Common
    from ..ops.fused import SwiGLU

L2_EPS = 1e-6
"""Under the root of the squared norm of queries and keys, as flash-linear-attention and transformers do."""


class GatedDeltaMixer(nn.Module):
    """A short convolution and the gated delta rule over packed tokens: hidden [T, C] -> [T, C]."""

    def __init__(self, spec: GatedDelta, make: Maker):
        super().__init__()
        self.spec, self.backend, self.arithmetic = spec, make.backend, make.arithmetic
        hidden = make.arch.hidden_size
        value = spec.num_value_heads * spec.value_head_dim
        self.channels = 2 * spec.num_key_heads * spec.key_head_dim + value
        self.qkvz = make.linear(self.channels + value, hidden)
        self.ba = make.linear(2 * spec.num_value_heads, hidden)
        self.conv = make.weight(self.channels, spec.conv_kernel)
        self.dt_bias = make.weight(spec.num_value_heads).weight
        self.A_log = make.weight(spec.num_value_heads).weight
        self.norm = make.norm(spec.value_head_dim, zero_centered=False)
        self.out = make.linear(hidden, value)

    def forward(self, x_TC: Tensor, cos_TR: None, sin_TR: None, packing: Packing) -> Tensor:
        tree, value = packing.tree, self.spec.num_value_heads * self.spec.value_head_dim
        if tree is not None:
            x_TC = tree.gather(x_TC)
        mixed_TC, z_TV = torch.split(self.qkvz(x_TC), [self.channels, value], dim=-1)
        g_TK, beta_TK = gates(self.ba(x_TC), self.A_log, self.dt_bias, self.arithmetic)
        if tree is None:
            o_TKE, _, _ = self._run(
                mixed_TC, g_TK, beta_TK, packing.cu_seqlens, packing.common, None, final=False
            )
        else:
            o_TKE = self._generations(mixed_TC, g_TK, beta_TK, tree)
        y_TC: Tensor = self.out(gated_norm(self.norm(o_TKE), z_TV, self.backend.mlp.swiglu))
        return y_TC if tree is None else tree.scatter(y_TC)

    def _generations(self, mixed_TC: Tensor, g_TK: Tensor, beta_TK: Tensor, tree: Tree) -> Tensor:
        """Roots first; a child starts from its root's last state and last inputs of the convolution."""
        cut = tree.root_tokens
        roots_TKE, window_RCW, state_RKDE = self._run(
            mixed_TC[:cut], g_TK[:cut], beta_TK[:cut], tree.root_cu_seqlens, tree.roots, None, final=True
        )
        start = (window_RCW.index_select(0, tree.parents), state_RKDE.index_select(0, tree.parents))
        children_TKE, _, _ = self._run(
            mixed_TC[cut:],
            g_TK[cut:],
            beta_TK[cut:],
            tree.child_cu_seqlens,
            tree.children,
            start,
            final=False,
        )
        return torch.cat([roots_TKE, children_TKE])

    def _run(
        self, mixed_TC: Tensor, g_TK: Tensor, beta_TK: Tensor, cu_seqlens: Tensor, common: Common | None,
        start: tuple[Tensor, Tensor] | None, *, final: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(o_TKE, last windows, last states) of segments that start from `start`; the two are empty
        unless they are asked for."""
        ops, spec = self.backend, self.spec
        window, state = (None, None) if start is None else start
        mixed_TC, window = ops.short_conv.varlen(
            mixed_TC, self.conv.weight, cu_seqlens=cu_seqlens, initial_state_SCW=window, final_state=final,
            common=common,
        )  # fmt: skip
        q_THD, k_THD, v_TKE = heads(spec, mixed_TC)
        o_TKE, state = ops.gated_delta.chunk(
            q_THD, k_THD, v_TKE, g_TK, beta_TK, cu_seqlens=cu_seqlens, scale=spec.key_head_dim**-0.5,
            initial_state_SKDE=state, final_state=final, common=common,
        )  # fmt: skip
        if window is None or state is None:
            return o_TKE, o_TKE.new_empty(0), o_TKE.new_empty(0)
        return o_TKE, window, state


def gates(ba_TG: Tensor, A_log_K: Tensor, dt_bias_K: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """(g, beta) [T, K] in float32 from the projections b and a side by side: the log of the decay,
    -exp(A_log) softplus(a + dt_bias), and the strength of writing, sigmoid(b)."""
    b_TK, a_TK = ba_TG.float().chunk(2, dim=-1)
    g_TK = -A_log_K.float().exp() * arithmetic.softplus(a_TK + dt_bias_K.float())
    return g_TK, arithmetic.sigmoid(b_TK)


def heads(spec: GatedDelta, mixed_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_THD and k_THD of length one and v_TKE from the convolution's channels."""
    keys = spec.num_key_heads * spec.key_head_dim
    values = spec.num_value_heads * spec.value_head_dim
    q_TF, k_TF, v_TF = torch.split(mixed_TC, [keys, keys, values], dim=-1)
    q_THD, k_THD = (l2_norm(x.view(-1, spec.num_key_heads, spec.key_head_dim)) for x in (q_TF, k_TF))
    return q_THD, k_THD, v_TF.view(-1, spec.num_value_heads, spec.value_head_dim)


def l2_norm(x_THD: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, computed in float32."""
    wide = x_THD.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x_THD.dtype)


def gated_norm(normed_TKE: Tensor, z_TV: Tensor, swiglu: SwiGLU) -> Tensor:
    """The normed output times silu(z), [T, K * E]: a SwiGLU, whose product is taken in float32."""
    return swiglu(torch.cat([z_TV, normed_TKE.flatten(1)], dim=-1))
