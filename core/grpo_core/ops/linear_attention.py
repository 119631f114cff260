"""Contracts of linear attention: the gated delta rule and the short causal convolution before it.

T packed tokens, B sequences, S segments, H key heads, K value heads (a multiple of H), D key head dim, E
value head dim, C channels, W the convolution's width. `common` is the hint of `attention`, about these
segments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .common import Common


class DeltaChunk(Protocol):
    """The gated delta rule over packed segments (Yang et al. 2024, arXiv 2412.06464).

    For each value head, with a state M of [D, E] that starts at the segment's initial state:
    M <- exp(g_t) M; M <- M + k_t (beta_t (v_t - M^T k_t))^T; o_t = scale M^T q_t. Value head j reads key
    head j // (K // H). Differentiable in q, k, v, g, beta and initial_state.
    """

    def __call__(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_TKE: Tensor,
        g_TK: Tensor,
        beta_TK: Tensor,
        *,
        cu_seqlens: Tensor,
        scale: float,
        initial_state_SKDE: Tensor | None,
        final_state: bool,
        common: Common | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (o_TKE in v's dtype, states after each segment in float32 [S, K, D, E] or None).

        q and k are already normalised; g <= 0 and beta are float32; None starts every segment at zero. The
        state is kept in float32. A segment without tokens ends in its initial state.
        """
        ...


class DeltaStep(Protocol):
    """One token of each sequence, the state updated in place."""

    def __call__(
        self,
        q_BHD: Tensor,
        k_BHD: Tensor,
        v_BKE: Tensor,
        g_BK: Tensor,
        beta_BK: Tensor,
        *,
        state_NKDE: Tensor,
        slots: Tensor,
        scale: float,
    ) -> Tensor:
        """Returns o_BKE. Sequence b reads and writes state_NKDE[slots[b]].

        The state is float32 and is updated in place; slots are int64 and distinct.
        """
        ...


class ConvVarlen(Protocol):
    """Causal depthwise convolution over packed segments, then SiLU. Differentiable in x, w, initial_state."""

    def __call__(
        self,
        x_TC: Tensor,
        w_CW: Tensor,
        *,
        cu_seqlens: Tensor,
        initial_state_SCW: Tensor | None,
        final_state: bool,
        common: Common | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (y_TC, last inputs of each segment [S, C, W - 1] in x's dtype or None).

        y[t, c] = silu(sum_i w[c, i] x[t - (W - 1) + i, c]); inputs before a segment are its initial state
        [S, C, W - 1] (oldest first), or zeros. Summed in float32.
        """
        ...


class ConvStep(Protocol):
    """One token of each sequence, the window updated in place."""

    def __call__(self, x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
        """Returns y_BC. Sequence b shifts x_BC[b] into state_NCW[slots[b]] ([C, W - 1], oldest first)."""
        ...
