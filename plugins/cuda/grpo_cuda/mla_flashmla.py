"""mla.decode with FlashMLA: the absorbed form over pages of 64 rows [latent | rotary key], on Hopper.

Both of the package's interfaces are served: until 2025 `get_mla_metadata` returned two tensors made from the
lengths, since 2026 an object that the first call fills and nothing. Either is handed on as it came, and made
once for all layers of a pass, since it holds for one set of lengths.
"""

from __future__ import annotations

from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer

from .lengths import shared
from .mla import absorb, project
from .mla_cache import latents


def decode(
    q_nope_BHN: Tensor, q_rope_BHR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaDecode`, over `LatentPages`."""
    layer = latents(cache)
    B, H, _ = q_nope_BHN.shape
    if not B:
        return q_nope_BHN.new_empty(0, H, w_uv_HEL.shape[1])
    reading = layer.reading(slots, seqlens_k, common)
    metadata, num_splits = shared(common, "mla metadata", lambda: get_mla_metadata(reading.used_B, H, 1))
    o_B1HL, _ = flash_mla_with_kvcache(
        absorb(q_nope_BHN, q_rope_BHR, w_uk_HNL).unsqueeze(1),
        layer.k_PSKD,
        reading.blocks_BW,
        reading.used_B,
        layer.L,
        metadata,
        num_splits,
        softmax_scale=scale,
    )
    return project(o_B1HL.squeeze(1), w_uv_HEL)
