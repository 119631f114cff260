"""Textbook float64 formulas of attention, norm, rotary and log-probs, independent of core's references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, lengths: Sequence[int], parents: Sequence[int],
    scale: float, causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    """All pairs at once in float64 with one mask over [T, T]; `parents` holds -1 for none."""
    T, H, K = q_THD.shape[0], q_THD.shape[1], k_TKD.shape[1]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    parent = torch.tensor([*parents, -1])[segment] if T else torch.zeros(0, dtype=torch.int64)
    start = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    before = torch.tensor([lengths[p] if p >= 0 else 0 for p in parents])
    position = torch.arange(T) - start[segment] + before[segment]
    back = position[:, None] - position[None, :]
    same = segment[:, None] == segment[None, :]
    inherited = parent[:, None] == segment[None, :]
    mask = same | inherited
    if causal:
        mask &= back >= 0
    if window is not None:
        mask &= back < window
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKE))
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o[0].transpose(0, 1)


def rms_norm(x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool) -> Tensor:
    """torch's own, in float64."""
    x, w = x.double(), w.double()
    x = x if residual is None else x + residual.double()
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), 1 + w if zero_centered else w, eps)


def rotate(x_THD: Tensor, angle_TR: Tensor, *, interleaved: bool) -> Tensor:
    """Rotation as a product of complex numbers."""
    angle = angle_TR.double()
    return turn(x_THD, angle.cos(), angle.sin(), interleaved=interleaved)


def turn(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool) -> Tensor:
    """`rotate` by given cosines and sines."""
    R = cos_TR.shape[1]
    x = x_THD.double()
    turned, rest = x[..., : 2 * R], x[..., 2 * R :]
    if interleaved:
        pairs = torch.complex(turned[..., 0::2], turned[..., 1::2])
    else:
        pairs = torch.complex(turned[..., :R], turned[..., R:])
    pairs = pairs * torch.complex(cos_TR.double(), sin_TR.double())[:, None]
    parts = torch.view_as_real(pairs)
    joined = parts.flatten(-2) if interleaved else torch.cat([parts[..., 0], parts[..., 1]], -1)
    return torch.cat([joined, rest], -1)


def logprob(
    hidden_TC: Tensor, head_VC: Tensor, labels_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and entropies, through all logits at once."""
    logits = hidden_TC.double() @ head_VC.double().T / temperature
    chosen = torch.log_softmax(logits, -1).gather(1, labels_T[:, None])[:, 0]
    p = torch.softmax(logits, -1)
    return chosen, torch.special.entr(p).sum(-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) times up, by the definition of the sigmoid."""
    gate, up = gate_up.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up
