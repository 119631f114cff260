"""The gated delta rule with flash-linear-attention's Triton kernels.

Its kernels number sequences by their chunks, and in some releases (0.4, 0.5.0) one without tokens shifts the
numbers of all after it: segments without tokens are left out of the call and keep their state here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds

from .lengths import shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """The segments that have tokens."""

    cu_seqlens: Tensor
    """int64 [F + 1] on the device."""
    cu_seqlens_cpu: Tensor
    """The same on the host, so that the vendor need not fetch it."""
    segments: Tensor | None
    """int64 [F]; None where all have tokens."""
    source: Tensor | None
    """int64 [S]: where the state after each segment lies in [those after the F | those before the S]."""


def filled(cu_seqlens: Tensor, tokens: int, common: Common | None) -> Filled:
    """The segments that have tokens. Raises ValueError as `bounds` does."""

    def make() -> Filled:
        ends = bounds(cu_seqlens, tokens, common)
        some = [s for s in range(len(ends) - 1) if ends[s + 1] > ends[s]]
        at = {segment: place for place, segment in enumerate(some)}
        kept = torch.tensor([0, *(ends[s + 1] for s in some)])
        every = len(some) == len(ends) - 1
        source = torch.tensor([at.get(s, len(some) + s) for s in range(len(ends) - 1)], dtype=torch.int64)
        device = cu_seqlens.device
        return Filled(
            cu_seqlens=kept.to(device),
            cu_seqlens_cpu=kept,
            segments=None if every else torch.tensor(some, dtype=torch.int64).to(device),
            source=None if every else source.to(device),
        )

    return shared(common, "segments with tokens", make)


def states_of(state: Tensor | None, some: Filled) -> Tensor | None:
    """Those of the segments that have tokens."""
    return state if state is None or some.segments is None else state.index_select(0, some.segments)


def chunk(
    q_THD: Tensor, k_THD: Tensor, v_TKE: Tensor, g_TK: Tensor, beta_TK: Tensor, *, cu_seqlens: Tensor,
    scale: float, initial_state_SKDE: Tensor | None, final_state: bool, common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaChunk`."""
    (T, K, E), D = v_TKE.shape, q_THD.shape[2]
    some = filled(cu_seqlens, T, common)
    before_SKDE = initial_state_SKDE
    if before_SKDE is None and final_state:
        before_SKDE = v_TKE.new_zeros(cu_seqlens.shape[0] - 1, K, D, E, dtype=torch.float32)
    if not T:
        return v_TKE, before_SKDE if final_state else None
    o_1TKE, last_FKDE = chunk_gated_delta_rule(
        q_THD[None],
        k_THD[None],
        v_TKE[None],
        g_TK[None],
        beta_TK[None],
        scale=scale,
        initial_state=states_of(initial_state_SKDE, some),
        output_final_state=final_state,
        cu_seqlens=some.cu_seqlens,
        cu_seqlens_cpu=some.cu_seqlens_cpu,
    )
    if not final_state or some.source is None:
        return o_1TKE[0], last_FKDE if final_state else None
    return o_1TKE[0], torch.cat([last_FKDE, before_SKDE]).index_select(0, some.source)


def step(
    q_BHD: Tensor, k_BHD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor, *, state_NKDE: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaStep`: the vendor's states have no slots and are copied."""
    if not v_BKE.shape[0]:
        return v_BKE
    o_B1KE, state_BKDE = fused_recurrent_gated_delta_rule(
        q_BHD[:, None],
        k_BHD[:, None],
        v_BKE[:, None],
        g=g_BK[:, None],
        beta=beta_BK[:, None],
        scale=scale,
        initial_state=state_NKDE.index_select(0, slots),
        output_final_state=True,
    )
    state_NKDE.index_copy_(0, slots, state_BKDE)
    return o_B1KE[:, 0]
