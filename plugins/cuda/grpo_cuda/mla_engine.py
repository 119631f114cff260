"""mla.varlen with Transformer Engine: cuDNN takes values narrower than keys as they are."""

from __future__ import annotations

from torch import Tensor

from grpo_core.ops.common import Common

from . import engine
from .mla import SDPA, Kernels, train

ENGINE = Kernels(varlen=engine.varlen, shared_prefix=engine.shared_prefix, cross=SDPA.cross)


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`."""
    return train(
        ENGINE, q_nope_THN, q_rope_THR, latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL, cu_seqlens, parents,
        max_seqlen, scale, common,
    )  # fmt: skip
