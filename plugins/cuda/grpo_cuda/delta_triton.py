"""One token of every sequence through the gated delta rule and the short convolution, in Triton.

States stay in their slots and each number of them is read and written once: bound by memory, 8 D E bytes for
a value head. All sums are float32 and in one program: equal bits from equal inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import power_of_two

STATE = 8192
"""Most numbers of a state that a program keeps."""


def step(
    q_BHD: Tensor, k_BHD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor, *, state_NKDE: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaStep`. Raises ValueError for heads that do not divide and for
    states that are not contiguous."""
    (B, K, E), (_, H, D) = v_BKE.shape, q_BHD.shape
    if K % H or not state_NKDE.is_contiguous():
        raise ValueError(f"{K} value heads over {H} key heads, states of strides {state_NKDE.stride()}")
    o_BKE = v_BKE.new_empty(B, K, E)
    rows = power_of_two(D)
    columns = min(power_of_two(E), max(1, STATE // rows))
    if B:
        step_kernel[(B, K, triton.cdiv(E, columns))](
            *(x.contiguous() for x in (q_BHD, k_BHD, v_BKE, g_BK, beta_BK)), state_NKDE, slots, o_BKE, scale,
            H, K, D, E, ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return o_BKE


@triton.jit
def step_kernel(
    q, k, v, g, beta, state, slots, o, scale, H, K, D, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Some columns of one head's state: decayed, corrected by the new pair, read."""
    b, head, slot = tl.program_id(0), tl.program_id(1), tl.load(slots + tl.program_id(0)).to(tl.int64)
    d, e = tl.arange(0, ROWS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_d, in_e = d < D, e < E
    inside = in_d[:, None] & in_e[None, :]
    key_at = (b * H + head // (K // H)) * D + d
    pair = b * K + head
    query = tl.load(q + key_at, mask=in_d, other=0.0).to(tl.float32)
    key = tl.load(k + key_at, mask=in_d, other=0.0).to(tl.float32)
    value = tl.load(v + pair * E + e, mask=in_e, other=0.0).to(tl.float32)
    at = state + (slot * K + head) * D * E + d[:, None] * E + e[None, :]
    memory = tl.load(at, mask=inside, other=0.0) * tl.exp(tl.load(g + pair).to(tl.float32))
    recalled = tl.sum(memory * key[:, None], 0)
    change = tl.load(beta + pair).to(tl.float32) * (value - recalled)
    memory += key[:, None] * change[None, :]
    tl.store(at, memory, mask=inside)
    read = scale * tl.sum(memory * query[:, None], 0)
    tl.store(o + pair * E + e, read.to(o.dtype.element_ty), mask=in_e)


def conv_step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """See `grpo_core.ops.linear_attention.ConvStep`. Raises ValueError for states that are not contiguous."""
    (B, C), W = x_BC.shape, w_CW.shape[1]
    if not state_NCW.is_contiguous():
        raise ValueError(f"states of strides {state_NCW.stride()} are not contiguous")
    y_BC = x_BC.new_empty(B, C)
    columns = min(512, power_of_two(C))
    if B:
        conv_step_kernel[(B, triton.cdiv(C, columns))](
            x_BC.contiguous(), w_CW.contiguous(), state_NCW, slots, y_BC, C, W=W, COLUMNS=columns, num_warps=4
        )
    return y_BC


@triton.jit
def conv_step_kernel(x, w, state, slots, y, C, W: tl.constexpr, COLUMNS: tl.constexpr):
    """Some channels of one sequence: the window times the weights, then shifted by one."""
    b, slot = tl.program_id(0).to(tl.int64), tl.load(slots + tl.program_id(0)).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < C
    window = state + (slot * C + c) * (W - 1)
    new = tl.load(x + b * C + c, mask=inside, other=0.0)
    total = new.to(tl.float32) * tl.load(w + c * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        old = tl.load(window + i, mask=inside, other=0.0)
        total += old.to(tl.float32) * tl.load(w + c * W + i, mask=inside, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(window + i - 1, old, mask=inside)
    if W > 1:
        tl.store(window + W - 2, new.to(state.dtype.element_ty), mask=inside)
    small = tl.exp(-tl.abs(total))
    sigmoid = tl.where(total >= 0, 1.0, small) / (1.0 + small)
    tl.store(y + b * C + c, (total * sigmoid).to(y.dtype.element_ty), mask=inside)
