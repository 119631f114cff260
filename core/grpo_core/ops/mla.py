"""Contracts of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): training, cache, prefill, decode.

T packed tokens, B sequences, S segments, H heads, N and R the parts of a query or key without and with
rotary, E the head dim of values, L the latent rank. Keys and values of head h are linear in the latent:
k_h = [w_uk[h] latent | k_rope], v_h = w_uv[h] latent. `scale` multiplies the scores.
`common` is the hint of `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .attention import CacheSpec
    from .common import Common


class MlaVarlen(Protocol):
    """Causal attention over packed segments; a segment may also see all of its parent (see `SharedPrefix`).

    Differentiable in the first six arguments.
    """

    def __call__(
        self,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        latent_TL: Tensor,
        k_rope_TR: Tensor,
        w_uk_HNL: Tensor,
        w_uv_HEL: Tensor,
        *,
        cu_seqlens: Tensor,
        parents: Tensor | None,
        max_seqlen: int,
        scale: float,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_THE in the dtype of q. The latent is already normed, the rotary parts already turned.

        `parents` is int32 [S], an earlier segment without a parent or -1; None where all stand alone.
        `w_uk_HNL` and `w_uv_HEL` may be strided views of one parameter.
        """
        ...


class LatentLayer(Protocol):
    """One layer's view of a latent cache; handed to prefill and decode."""

    def write(self, latent_TL: Tensor, k_rope_TR: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """Store the latent and the rotated shared key of token positions_T[t] of sequence slots_T[t]."""
        ...


class LatentCache(Protocol):
    """Latent storage of all MLA layers; the same life cycle as `KVCache`.

    The spec has num_key_value_heads 1, head_dim L + R and v_head_dim L. An offer of `mla.prefill` or
    `mla.decode` declares `limits={"cache": {"<plugin>:<name>"}}` with the cache ids that it reads.
    """

    layers: Sequence[LatentLayer]

    def __init__(self, spec: CacheSpec) -> None: ...

    def allocate(self, length: int) -> int | None: ...

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None: ...

    def free(self, slot: int) -> None: ...

    def reset(self) -> None: ...

    def nbytes(self) -> int: ...

    def release(self) -> None: ...

    def restore(self) -> None: ...


class MlaPrefill(Protocol):
    """New tokens against the cached prefix of their sequence; the new tokens were written before."""

    def __call__(
        self,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        cache: LatentLayer,
        w_uk_HNL: Tensor,
        w_uv_HEL: Tensor,
        *,
        cu_seqlens_q: Tensor,
        seqlens_k: Tensor,
        slots: Tensor,
        scale: float,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_THE. seqlens_k [B] counts prefix and new tokens; causal, aligned at the end."""
        ...


class MlaDecode(Protocol):
    """One new token for each sequence, in the absorbed form: scores and sums are taken over the latent.

    q_nope is carried to the latent by w_uk, the weighted latent to the value by w_uv (section 2.1.3 and
    appendix C of arXiv 2405.04434), so that a cached token costs L + R numbers whatever the heads.
    """

    def __call__(
        self,
        q_nope_BHN: Tensor,
        q_rope_BHR: Tensor,
        cache: LatentLayer,
        w_uk_HNL: Tensor,
        w_uv_HEL: Tensor,
        *,
        seqlens_k: Tensor,
        slots: Tensor,
        scale: float,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_BHE. seqlens_k [B] int64 counts the new token, which was written before."""
        ...
