"""short_conv.varlen with flash-linear-attention's Triton kernel, from where it is since 0.6."""

from __future__ import annotations

from fla.modules.causal_conv1d import causal_conv1d
from torch import Tensor
from torch.nn.functional import pad

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds

from .delta_conv import last_inputs
from .fla import filled, states_of


def varlen(
    x_TC: Tensor, w_CW: Tensor, *, cu_seqlens: Tensor, initial_state_SCW: Tensor | None, final_state: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.ConvVarlen`. The vendor's windows have W inputs, the oldest of
    which no output needs."""
    T = x_TC.shape[0]
    last_SCW = None
    if final_state:
        last_SCW = last_inputs(x_TC, initial_state_SCW, w_CW.shape[1], bounds(cu_seqlens, T, common), common)
    if not T:
        return x_TC, last_SCW
    some = filled(cu_seqlens, T, common)
    window_FCW = states_of(initial_state_SCW, some)
    y_1TC, _ = causal_conv1d(
        x_TC[None],
        weight=w_CW,
        initial_state=None if window_FCW is None else pad(window_FCW.to(x_TC.dtype), (1, 0)),
        output_final_state=False,
        activation="silu",
        cu_seqlens=some.cu_seqlens,
        cu_seqlens_cpu=some.cu_seqlens_cpu,
    )
    return y_1TC[0], last_SCW
