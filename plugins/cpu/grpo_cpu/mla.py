"""mla.varlen and mla.prefill: keys and values are expanded once, then attended by the packed kernels.

`Packed` is the kernel: attention.shared_prefix and attention.varlen in torch here, those of the C++ pack in
`native_mla`. A few new tokens after a long prefix are cheaper in the absorbed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from grpo_core.ops.attention import SharedPrefix, Varlen
from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.attention import bounds

from .attention import shared_prefix as torch_shared_prefix
from .attention import varlen as torch_varlen
from .mla_absorbed import SCORES, absorbed, causal_mask
from .mla_cache import SharedLatentLayer, shared_latents


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The attention that expanded keys and values are handed to."""

    varlen: Varlen
    shared_prefix: SharedPrefix

    def __call__(
        self, q_THD: Tensor, k_THD: Tensor, v_THE: Tensor, cu_seqlens: Tensor, parents: Tensor | None,
        max_seqlen: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """Causal attention of packed segments."""
        if parents is None:
            return self.varlen(
                q_THD, k_THD, v_THE, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, causal=True,
                window=None,
            )  # fmt: skip
        return self.shared_prefix(
            q_THD, k_THD, v_THE, cu_seqlens=cu_seqlens, parents=parents, max_seqlen=max_seqlen, scale=scale,
            window=None,
        )  # fmt: skip


TORCH = Packed(varlen=torch_varlen, shared_prefix=torch_shared_prefix)


def expand(latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor, w_uv_HEL: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [T, H, N + R] and values [T, H, E]."""
    T, L = latent_TL.shape
    (H, N, _), E = w_uk_HNL.shape, w_uv_HEL.shape[1]
    k_nope_THN = (latent_TL @ w_uk_HNL.reshape(H * N, L).T).view(T, H, N)
    v_THE = (latent_TL @ w_uv_HEL.reshape(H * E, L).T).view(T, H, E)
    return torch.cat([k_nope_THN, k_rope_TR[:, None].expand(-1, H, -1)], -1), v_THE


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`."""
    k_THD, v_THE = expand(latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL)
    return TORCH(
        torch.cat([q_nope_THN, q_rope_THR], -1), k_THD, v_THE, cu_seqlens, parents, max_seqlen, scale
    )


def prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`."""
    return prefill_with(
        TORCH, q_nope_THN, q_rope_THR, shared_latents(cache), w_uk_HNL, w_uv_HEL,
        bounds(cu_seqlens_q, q_nope_THN.shape[0], common), seqlens_k.tolist(), slots.tolist(), scale,
    )  # fmt: skip


def prefill_with(
    packed: Packed, q_nope_THN: Tensor, q_rope_THR: Tensor, layer: SharedLatentLayer, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, ends: list[int], lengths: list[int], slots: list[int], scale: float,
) -> Tensor:  # fmt: skip
    """Whole prompts in one packed call; the others one by one, absorbed where that is less work."""
    counts = [end - start for start, end in pairwise(ends)]
    T, H, N = q_nope_THN.shape
    E, L = w_uv_HEL.shape[1:]
    rows = [_rows(layer, slot, length) for slot, length in zip(slots, lengths, strict=True)]
    if not rows:
        return q_nope_THN.new_empty(0, H, E)
    if counts == lengths:
        k_THD, v_THE = expand(*_latents(layer, torch.cat(rows)), w_uk_HNL, w_uv_HEL)
        q_THD = torch.cat([q_nope_THN, q_rope_THR], -1)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        return packed(q_THD, k_THD, v_THE, cu_seqlens, None, max(counts), scale)
    o_THE = q_nope_THN.new_empty(T, H, E)
    for (start, end), rows_S in zip(pairwise(ends), rows, strict=True):
        q = q_nope_THN[start:end], q_rope_THR[start:end]
        if (end - start) * (2 * L - N - E) < L * (N + E):
            o_THE[start:end] = absorbed(*q, layer, w_uk_HNL, w_uv_HEL, rows_S, scale)
        else:
            k_SHD, v_SHE = expand(*_latents(layer, rows_S), w_uk_HNL, w_uv_HEL)
            o_THE[start:end] = _last_queries(torch.cat(q, -1), k_SHD, v_SHE, scale)
    return o_THE


def _rows(layer: SharedLatentLayer, slot: int, length: int) -> Tensor:
    at_S = torch.arange(length)
    return layer.table.rows(torch.full_like(at_S, slot), at_S)


def _latents(layer: SharedLatentLayer, rows_S: Tensor) -> tuple[Tensor, Tensor]:
    rows_SW = layer.rows_XW.index_select(0, rows_S)
    return rows_SW[:, : layer.L], rows_SW[:, layer.L :]


def _last_queries(q_QHD: Tensor, k_SHD: Tensor, v_SHE: Tensor, scale: float) -> Tensor:
    """Causal attention of the last Q of S tokens, in blocks of queries."""
    Q, H, _ = q_QHD.shape
    S = k_SHD.shape[0]
    k_HDS, v_HSE = k_SHD.permute(1, 2, 0), v_SHE.transpose(0, 1)
    outputs = []
    size = max(1, SCORES // (H * S))
    for first in range(0, Q, size):
        q_HQD = q_QHD[first : first + size].transpose(0, 1)
        scores_HQS = (q_HQD @ k_HDS).float() if q_QHD.dtype == torch.bfloat16 else q_HQD @ k_HDS
        scores_HQS.mul_(scale).add_(causal_mask(q_HQD.shape[1], S - Q + first, S))
        outputs.append((torch.softmax(scores_HQS, -1).to(q_QHD.dtype) @ v_HSE).transpose(0, 1))
    return torch.cat(outputs)
