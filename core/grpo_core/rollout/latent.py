"""Multi-head latent attention for inference: the cache holds latents, keys and values are never stored."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ..model.mla import up_projections

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..backend import Backend
    from ..model.arch import MLA
    from ..ops.common import Common
    from ..ops.mla import LatentLayer
    from .batch import PrefillAt, StepAt, Turn
    from .weights import DecoderWeights


class LatentMixer:
    """One MLA layer: hidden states in, heads side by side out."""

    def __init__(
        self, spec: MLA, backend: Backend, weights: DecoderWeights, cache: LatentLayer, prefix: str, rope: int
    ) -> None:
        plain, linears = weights.plain, weights.linears
        self.spec = spec
        self.cache = cache
        self.rope = rope
        self.ops = backend.mla
        self.turn = backend.rope.apply
        norm = partial(backend.norm.rms, eps=spec.latent_norm_eps, residual=None, zero_centered=False)
        self.norm_latent = partial(norm, w=plain[f"{prefix}.kv_a_norm.weight"])
        self.kv_a = linears[f"{prefix}.kv_a"].__call__
        self.query: Callable[[Tensor], Tensor]
        if spec.q_lora_rank is None:
            self.query = linears[f"{prefix}.q"].__call__
        else:
            q_a, q_b = linears[f"{prefix}.q_a"], linears[f"{prefix}.q_b"]
            norm_q = partial(norm, w=plain[f"{prefix}.q_a_norm.weight"])
            self.query = lambda x_TC: q_b(norm_q(q_a(x_TC)))
        # Views of the stored weight, so that a weight update reaches them.
        self.w_uk_HNL, self.w_uv_HEL = up_projections(spec, plain[f"{prefix}.kv_b.weight"])

    def step(self, x_BC: Tensor, at: StepAt) -> Tensor:
        """Attended values of one token of each sequence, [B, H * E]."""
        q_nope_BHN, q_rope_BHR, latent_BL, k_rope_BR = self._project(x_BC, at.turns[self.rope], at.common)
        self.cache.write(latent_BL, k_rope_BR, slots_T=at.slots, positions_T=at.positions)
        o_BHE = self.ops.decode(
            q_nope_BHN, q_rope_BHR, self.cache, self.w_uk_HNL, self.w_uv_HEL,
            seqlens_k=at.seqlens_k, slots=at.slots, scale=self.spec.scale, common=at.common,
        )  # fmt: skip
        return o_BHE.flatten(1)

    def prefill(self, x_TC: Tensor, at: PrefillAt) -> Tensor:
        """Attended values of a pass, [T, H * E]."""
        batch, scale, common = at.batch, self.spec.scale, at.batch.common
        q_nope_THN, q_rope_THR, latent_TL, k_rope_TR = self._project(x_TC, at.turns[self.rope], common)
        self.cache.write(latent_TL, k_rope_TR, slots_T=batch.slots_T, positions_T=batch.positions_T)
        if batch.fresh:
            o_THE = self.ops.varlen(
                q_nope_THN, q_rope_THR, latent_TL, k_rope_TR, self.w_uk_HNL, self.w_uv_HEL,
                cu_seqlens=batch.cu_seqlens, parents=None, max_seqlen=batch.max_seqlen, scale=scale,
                common=common,
            )  # fmt: skip
        else:
            o_THE = self.ops.prefill(
                q_nope_THN, q_rope_THR, self.cache, self.w_uk_HNL, self.w_uv_HEL,
                cu_seqlens_q=batch.cu_seqlens, seqlens_k=batch.seqlens_k, slots=batch.slots, scale=scale,
                common=common,
            )  # fmt: skip
        return o_THE.flatten(1)

    def _project(
        self, x_TC: Tensor, turn: Turn, common: Common | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q_nope_THN, q_rope_THR, latent_TL, k_rope_TR), normed and rotated."""
        spec = self.spec
        nope, rope = spec.qk_nope_head_dim, spec.qk_rope_head_dim
        q_THD = self.query(x_TC).view(-1, spec.num_attention_heads, nope + rope)
        q_nope_THN, q_rope_THR = torch.split(q_THD, [nope, rope], dim=-1)
        latent_TL, k_rope_TR = torch.split(self.kv_a(x_TC), [spec.kv_lora_rank, rope], dim=-1)
        q_rope_THR, k_rope_T1R = self.turn(
            q_rope_THR, k_rope_TR[:, None], *turn, interleaved=spec.rope.interleaved, common=common
        )
        return q_nope_THN, q_rope_THR, self.norm_latent(latent_TL), k_rope_T1R[:, 0]
