"""Multi-head latent attention of the training decoder (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arch import MLA
from .layers import Maker, Packing


class MLAMixer(nn.Module):
    """Latent attention over packed tokens: hidden [T, C] -> [T, C].

    Keys and values of all heads are linear in one normed latent of each token; beside it goes one rotated
    key that the heads share. `kv_b` holds each head's rows of keys, then of values.
    """

    def __init__(self, spec: MLA, make: Maker):
        super().__init__()
        self.spec, self.backend = spec, make.backend
        heads, hidden, latent = spec.num_attention_heads, make.arch.hidden_size, spec.kv_lora_rank
        q_rows = heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
        if spec.q_lora_rank is None:
            self.q = make.linear(q_rows, hidden)
        else:
            self.q_a = make.linear(spec.q_lora_rank, hidden, bias=spec.bias)
            self.q_a_norm = make.norm(spec.q_lora_rank, eps=spec.latent_norm_eps, zero_centered=False)
            self.q_b = make.linear(q_rows, spec.q_lora_rank)
        self.kv_a = make.linear(latent + spec.qk_rope_head_dim, hidden, bias=spec.bias)
        self.kv_a_norm = make.norm(latent, eps=spec.latent_norm_eps, zero_centered=False)
        self.kv_b = make.weight(heads * (spec.qk_nope_head_dim + spec.v_head_dim), latent)
        self.out = make.linear(hidden, heads * spec.v_head_dim, bias=spec.bias)

    def forward(self, x_TC: Tensor, cos_TR: Tensor, sin_TR: Tensor, packing: Packing) -> Tensor:
        spec, ops = self.spec, self.backend
        nope, rope, latent = spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.kv_lora_rank
        q_TF = self.q(x_TC) if spec.q_lora_rank is None else self.q_b(self.q_a_norm(self.q_a(x_TC)))
        q_THD = q_TF.view(-1, spec.num_attention_heads, nope + rope)
        q_nope_THN, q_rope_THR = torch.split(q_THD, [nope, rope], dim=-1)
        latent_TL, k_rope_TR = torch.split(self.kv_a(x_TC), [latent, rope], dim=-1)
        latent_TL = self.kv_a_norm(latent_TL)
        q_rope_THR, k_rope_T1R = ops.rope.apply(
            q_rope_THR, k_rope_TR.unsqueeze(1), cos_TR, sin_TR, interleaved=spec.rope.interleaved,
            common=packing.common,
        )  # fmt: skip
        w_uk_HNL, w_uv_HEL = up_projections(spec, self.kv_b.weight)
        o_THE = ops.mla.varlen(
            q_nope_THN, q_rope_THR, latent_TL, k_rope_T1R.squeeze(1), w_uk_HNL, w_uv_HEL,
            cu_seqlens=packing.cu_seqlens, parents=packing.parents, max_seqlen=packing.max_seqlen,
            scale=spec.scale, common=packing.common,
        )  # fmt: skip
        return self.out(o_THE.flatten(1))  # type: ignore[no-any-return]


def up_projections(spec: MLA, kv_b: Tensor) -> tuple[Tensor, Tensor]:
    """Views (w_uk [H, N, L], w_uv [H, E, L]) of kv_b [H (N + E), L]."""
    rows_HXL = kv_b.view(spec.num_attention_heads, -1, spec.kv_lora_rank)
    w_uk_HNL, w_uv_HEL = torch.split(rows_HXL, [spec.qk_nope_head_dim, spec.v_head_dim], dim=1)
    return w_uk_HNL, w_uv_HEL
