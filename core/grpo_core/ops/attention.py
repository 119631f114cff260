"""Contracts of attention: packed training, prefill and decode over a cache that the offer lays out.

T packed tokens, B sequences, S segments, H/K query/kv heads, D/E head dims (E of v), Q query tokens.
`window` w lets a query see itself and the w - 1 keys before it; None lets it see all of them.
`cu_seqlens` is int32 [S + 1], starts at 0, ends at T. `scale` multiplies the scores. Queries, keys and values
may be slices of one projection: their last dimension is contiguous, the others have any stride.

`common` is a hint: what all layers of the pass have in common, with lengths on the host. None lets an op find
out itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .common import Common


class Varlen(Protocol):
    """Attention within each packed sequence; sequences never see each other. Differentiable in q, k, v."""

    def __call__(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKE: Tensor,
        *,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        causal: bool,
        window: int | None,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_THE in the dtype of q. Query head h reads kv head h // (H // K)."""
        ...


class SharedPrefix(Protocol):
    """Causal attention where a segment may also see all tokens of a parent segment.

    Used to compute a prompt once for the G completions of its group. `parents` is int32 [S]: the index
    of an earlier segment that has no parent itself, or -1. The query at offset i of segment s sees the
    whole parent and offsets 0..i of s. Differentiable in q, k, v. The parent's length counts towards the
    position of a query for `window`.
    """

    def __call__(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKE: Tensor,
        *,
        cu_seqlens: Tensor,
        parents: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_THE in the dtype of q. `max_seqlen` is the longest segment, parent not counted."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """The sizes of a key/value cache."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    max_slots: int
    """Sequences that can be alive at once, shared prefixes included."""
    max_tokens: int
    """Tokens that can be alive at once, each shared prefix counted once."""


class LayerCache(Protocol):
    """One layer's view of a cache; handed to prefill, decode and step."""

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """Store keys (already rotated) and values of token positions_T[t] of sequence slots_T[t]."""
        ...


class KVCache(Protocol):
    """Key/value storage of all layers; the layout is the offer's own.

    An offer of `attention.prefill`, `.decode` or `.step` declares `limits={"cache": {"<plugin>:<name>"}}`
    with the cache ids that it reads; the plan resolves `attention.cache` first.
    """

    layers: Sequence[LayerCache]

    def __init__(self, spec: CacheSpec) -> None: ...

    def allocate(self, length: int) -> int | None:
        """A slot (a number below max_slots) with room for `length` tokens, or None when the cache is full
        (nothing changed)."""
        ...

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        """A slot that shares the first `prefix` tokens of `slot` and has room for `length` more, or None.

        The parent must not be written to afterwards. Freeing it keeps its tokens while children live.
        """
        ...

    def free(self, slot: int) -> None:
        """Give the slot's own room back."""
        ...

    def reset(self) -> None:
        """Free every slot; the storage stays."""
        ...

    def nbytes(self) -> int:
        """Bytes of storage held."""
        ...

    def release(self) -> None:
        """Drop the storage (sleep); only with no slot alive. `restore` brings it back, empty."""
        ...

    def restore(self) -> None: ...


class Prefill(Protocol):
    """New tokens against the cached prefix of their sequence; the new tokens were written before."""

    def __call__(
        self,
        q_THD: Tensor,
        cache: LayerCache,
        *,
        cu_seqlens_q: Tensor,
        seqlens_k: Tensor,
        slots: Tensor,
        scale: float,
        window: int | None,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_THE. seqlens_k [B] counts prefix and new tokens; causal, aligned at the end."""
        ...


class Decode(Protocol):
    """One new token for each sequence; its key and value were written before."""

    def __call__(
        self,
        q_BHD: Tensor,
        cache: LayerCache,
        *,
        seqlens_k: Tensor,
        slots: Tensor,
        scale: float,
        window: int | None,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_BHE. seqlens_k [B] int64 counts the new token; slots [B] int64."""
        ...


class Step(Protocol):
    """Decode in one call: q/k norm where given, rotary, cache write and attention."""

    def __call__(
        self,
        qkv_BW: Tensor,
        cache: LayerCache,
        *,
        cos_BR: Tensor,
        sin_BR: Tensor,
        positions: Tensor,
        slots: Tensor,
        num_heads: int,
        scale: float,
        window: int | None,
        interleaved: bool,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        common: Common | None = None,
    ) -> Tensor:
        """Returns o_B(H*E). qkv_BW holds q, k, v of one token: W = (H + K) * D + K * E.

        cos_BR/sin_BR are float32 [B, rotary_dim / 2]; positions [B] int64 is where the token is written.
        """
        ...
