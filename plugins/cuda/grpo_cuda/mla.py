"""Multi-head latent attention: keys and values expanded for training and prompts, absorbed for decode.

The expanded form goes through any packed attention of this plugin (`Kernels`); here it is torch's
scaled_dot_product_attention, which takes values of another size than keys. In the absorbed form (DeepSeek-V2,
arXiv 2405.04434, section 2.1.3) a cached token is one key of L + R numbers for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from grpo_core.ops.attention import SharedPrefix, Varlen
from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.attention import accumulate as wider
from grpo_core.ops.reference.attention import bounds, visible

from . import plain, sdpa
from .lengths import shared
from .mla_cache import LatentPages, latents


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """New tokens of several sequences and all that they see, the same for all layers of a pass."""

    rows_N: Tensor
    """int64 rows of the pool: all tokens of each sequence that has new ones, one sequence after the other."""
    ends_q: list[int]
    """Ends of the sequences' new tokens, with the leading 0; then the same of their tokens."""
    ends_k: list[int]
    cu_seqlens_q: Tensor
    """int32; the same on the device."""
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Cross(Protocol):
    """Causal attention of packed queries over packed keys of other lengths, aligned at the end."""

    def __call__(
        self, q_THD: Tensor, k_NHD: Tensor, v_NHE: Tensor, prompts: Prompts, *, scale: float
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The packed attention that expanded keys and values are handed to."""

    varlen: Varlen
    shared_prefix: SharedPrefix
    cross: Cross
    one_size: bool = False
    """Takes keys and values of one size: the smaller ones are padded with zeros, which change nothing."""


def train(
    kernels: Kernels, q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor,
    w_uk_HNL: Tensor, w_uv_HEL: Tensor, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int,
    scale: float, common: Common | None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`."""
    E = w_uv_HEL.shape[1]
    q_THD = torch.cat([q_nope_THN, q_rope_THR], -1)
    k_THD, v_THE = expand(latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL)
    if kernels.one_size:
        q_THD, k_THD, v_THE = padded(q_THD, k_THD, v_THE)
    if parents is None:
        o_THE = kernels.varlen(
            q_THD, k_THD, v_THE, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, causal=True,
            window=None, common=common,
        )  # fmt: skip
    else:
        o_THE = kernels.shared_prefix(
            q_THD, k_THD, v_THE, cu_seqlens=cu_seqlens, parents=parents, max_seqlen=max_seqlen, scale=scale,
            window=None, common=common,
        )  # fmt: skip
    return o_THE[..., :E]


def expand(latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor, w_uv_HEL: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [T, H, N + R] and values [T, H, E]."""
    H, N, L = w_uk_HNL.shape
    k_nope_THN = (latent_TL @ w_uk_HNL.reshape(H * N, L).t()).view(-1, H, N)
    v_THE = (latent_TL @ w_uv_HEL.reshape(-1, L).t()).view(-1, H, w_uv_HEL.shape[1])
    return torch.cat([k_nope_THN, k_rope_TR[:, None].expand(-1, H, -1)], -1), v_THE


def padded(q_THD: Tensor, k_THD: Tensor, v_THE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All with heads of the larger size."""
    D, E = q_THD.shape[-1], v_THE.shape[-1]
    if D < E:
        return pad(q_THD, (0, E - D)), pad(k_THD, (0, E - D)), v_THE
    return q_THD, k_THD, pad(v_THE, (0, D - E))


def fill(
    kernels: Kernels, q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float,
    common: Common | None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`: what is in sight is gathered from its pages and expanded."""
    layer = latents(cache)
    T, H, _ = q_nope_THN.shape
    if not T:
        bounds(cu_seqlens_q, T, common)
        return q_nope_THN.new_empty(0, H, w_uv_HEL.shape[1])
    prompts = shared(common, "prompts", lambda: prompts_of(layer, cu_seqlens_q, seqlens_k, slots, T, common))
    k_NHD, v_NHE = expand(*layer.gather(prompts.rows_N), w_uk_HNL, w_uv_HEL)
    q_THD = torch.cat([q_nope_THN, q_rope_THR], -1)
    if kernels.one_size:
        q_THD, k_NHD, v_NHE = padded(q_THD, k_NHD, v_NHE)
    o_THE = kernels.cross(q_THD, k_NHD, v_NHE, prompts, scale=scale)
    return o_THE[..., : w_uv_HEL.shape[1]].to(q_nope_THN.dtype)


def prompts_of(
    layer: LatentPages, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, tokens: int,
    common: Common | None,
) -> Prompts:  # fmt: skip
    """Where new tokens and all that they see lie. Raises ValueError as `bounds` does."""
    ends_q = bounds(cu_seqlens_q, tokens, common)
    known = None if common is None else common.seqlens_k
    new = [end - start for start, end in pairwise(ends_q)]
    # A sequence without new tokens has keys all the same, which no query reads.
    counts = [int(n) if some else 0 for n, some in zip(known or seqlens_k.tolist(), new, strict=True)]
    ends_k = [0, *accumulate(counts)]
    size, device = layer.table.page_size, slots.device
    of_N = torch.repeat_interleave(torch.tensor(counts).to(device), output_size=ends_k[-1])
    at_N = torch.arange(ends_k[-1], device=device) - torch.tensor(ends_k[:-1]).to(device)[of_N]
    return Prompts(
        rows_N=layer.table.pages_SP[slots[of_N], at_N // size] * size + at_N % size,
        ends_q=ends_q,
        ends_k=ends_k,
        cu_seqlens_q=torch.tensor(ends_q, dtype=torch.int32).to(device),
        cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32).to(device),
        max_seqlen_q=max(new),
        max_seqlen_k=max(counts),
    )


def _sdpa_cross(q_THD: Tensor, k_NHD: Tensor, v_NHE: Tensor, prompts: Prompts, *, scale: float) -> Tensor:
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(prompts.ends_q), pairwise(prompts.ends_k), strict=True):
        if q1 > q0:
            at_S = torch.arange(k1 - k0, device=q_THD.device)
            q, k, v = (x.transpose(0, 1)[None] for x in (q_THD[q0:q1], k_NHD[k0:k1], v_NHE[k0:k1]))
            seen_QS = visible(at_S[k1 - k0 - (q1 - q0) :], at_S, causal=True, window=None)
            o_1HQE = scaled_dot_product_attention(
                q, k.to(q.dtype), v.to(q.dtype), attn_mask=seen_QS, scale=scale
            )
            outputs.append(o_1HQE[0].transpose(0, 1))
    return torch.cat(outputs)


SDPA = Kernels(varlen=sdpa.varlen, shared_prefix=sdpa.shared_prefix, cross=_sdpa_cross)


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`."""
    return train(SDPA, q_nope_THN, q_rope_THR, latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL, cu_seqlens, parents,
                 max_seqlen, scale, common)  # fmt: skip


def prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`, over `LatentPages`."""
    return fill(SDPA, q_nope_THN, q_rope_THR, cache, w_uk_HNL, w_uv_HEL, cu_seqlens_q, seqlens_k, slots,
                scale, common)  # fmt: skip


def decode(
    q_nope_BHN: Tensor, q_rope_BHR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaDecode`, over `LatentPages`. Absorbed queries, scores and sums stay in
    float32 or wider: rounded to bfloat16 on the way, a result is off by more than its own last rounding."""
    wide = wider(q_nope_BHN.dtype)
    q_BHW = absorb(q_nope_BHN.to(wide), q_rope_BHR.to(wide), w_uk_HNL.to(wide))
    o_BHL = plain.decode(
        q_BHW, latents(cache), seqlens_k=seqlens_k, slots=slots, scale=scale, window=None, common=common
    )
    return project(o_BHL, w_uv_HEL.to(wide)).to(q_nope_BHN.dtype)


def absorb(q_nope_BHN: Tensor, q_rope_BHR: Tensor, w_uk_HNL: Tensor) -> Tensor:
    """Queries of the rows [latent | rotary key], [B, H, L + R]."""
    q_BHL = torch.bmm(q_nope_BHN.transpose(0, 1), w_uk_HNL).transpose(0, 1)
    return torch.cat([q_BHL, q_rope_BHR], -1)


def project(o_BHL: Tensor, w_uv_HEL: Tensor) -> Tensor:
    """Weighted latents [B, H, L] as values [B, H, E]."""
    return torch.bmm(o_BHL.transpose(0, 1), w_uv_HEL.mT).transpose(0, 1)
