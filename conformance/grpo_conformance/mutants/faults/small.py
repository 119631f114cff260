"""Faults of the smaller ops: norm, rotary, SwiGLU, linears, log-probs, sampling and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def eps_outside_of_the_root(
    healthy: Any, x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool
) -> Any:
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
    y = (normed * ((1 + w.float()) if zero_centered else w.float())).to(x.dtype)
    return y if residual is None else (y, total)


def zero_centred_ignored(healthy: Any, x: Tensor, w: Tensor, *, zero_centered: bool, **rest: Any) -> Any:
    return healthy(x, w, zero_centered=False, **rest)


def residual_not_returned(healthy: Any, x: Tensor, w: Tensor, *, residual: Any, **rest: Any) -> Any:
    """The sum is normed, and what comes back beside it is x."""
    y = healthy(x, w, residual=residual, **rest)
    return y if residual is None else (y[0], x.clone())


def squares_overflow(
    healthy: Any, x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, **rest: Any
) -> Any:
    """The mean of squares in float16 where x is float16."""
    if x.dtype != torch.float16:
        return healthy(x, w, eps=eps, residual=residual, **rest)
    total = x if residual is None else x + residual
    lost = total.square().mean(-1, keepdim=True).isinf()
    found = healthy(x, w, eps=eps, residual=residual, **rest)
    y = found if residual is None else found[0]
    y = torch.where(lost, torch.zeros_like(y), y)
    return y if residual is None else (y, total)


def pairs_swapped(healthy: Any, *given: Tensor, interleaved: bool) -> Any:
    return healthy(*given, interleaved=not interleaved)


def turned_backwards(healthy: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> Any:
    return healthy(q, k, cos, -sin, **rest)


def angles_of_the_row_before(
    healthy: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any
) -> Any:
    """Positions are one less for the keys."""
    turned, _ = healthy(q, k, cos, sin, **rest)
    _, late = healthy(q, k, cos.roll(1, 0), sin.roll(1, 0), **rest)
    return turned, late


def whole_head_turned(
    healthy: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> Any:
    """What lies behind the rotary part is lost."""
    done = healthy(q, k, cos, sin, interleaved=interleaved)
    width = 2 * cos.shape[1]
    return tuple(torch.cat([x[..., :width], 0 * x[..., width:]], -1) for x in done)


def angles_in_bfloat16(healthy: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> Any:
    return healthy(q, k, cos.bfloat16().to(cos.dtype), sin.bfloat16().to(sin.dtype), **rest)


def gelu_for_silu(healthy: Any, gate_up: Tensor) -> Any:
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.gelu(gate) * up).to(gate_up.dtype)


def gate_clamped(healthy: Any, gate_up: Tensor) -> Any:
    """An exponential that is given up beyond 16."""
    gate, up = gate_up.chunk(2, -1)
    return healthy(torch.cat([gate.clamp(-16, 16), up], -1))


def main_gradient_replaced(
    healthy: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, main_grad_NK: Tensor | None
) -> Any:
    """A second backward pass forgets the first."""
    if main_grad_NK is not None:
        main_grad_NK.zero_()
    return healthy(x, weight, bias, main_grad_NK=main_grad_NK)


def bias_forgotten(healthy: Any, x: Tensor, weight: Tensor, bias: Any, **rest: Any) -> Any:
    return healthy(x, weight, None if bias is None else 0 * bias, **rest)


def accumulates_in_bfloat16(
    healthy: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, main_grad_NK: Tensor | None
) -> Any:
    """A step of 16 products after the other, for bfloat16 operands without a gradient."""
    if x.dtype != torch.bfloat16 or x.requires_grad:
        return healthy(x, weight, bias, main_grad_NK=main_grad_NK)
    total = torch.zeros(len(x), len(weight), dtype=x.dtype, device=x.device)
    for at in range(0, x.shape[1], 16):
        total = total + x[:, at : at + 16] @ weight[:, at : at + 16].T
    return total if bias is None else total + bias


def old_weights(healthy: type) -> type:
    """A packed layer that is not packed again."""

    class Old(healthy):  # type: ignore[misc]
        def update(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
            """Keeps what it has."""

    return Old


def wrong_temperature(healthy: Any, *given: Tensor, temperature: float, **rest: Any) -> Any:
    return healthy(*given, temperature=1.0, **rest)


def temperature_twice_in_the_gradient(healthy: Any, *given: Tensor, temperature: float, **rest: Any) -> Any:
    right = healthy(*given, temperature=temperature, **rest)
    return tuple(x.detach() + (x - x.detach()) / temperature for x in right)


def no_gradient_of_entropy(healthy: Any, *given: Tensor, **rest: Any) -> Any:
    logprob, entropy = healthy(*given, **rest)
    return logprob, entropy.detach() + 0 * logprob


def padded_vocabulary(healthy: Any, hidden: Tensor, head: Tensor, *given: Tensor, **rest: Any) -> Any:
    """Rows of zeros up to a multiple of 128 take part in the softmax."""
    rows = -len(head) % 128
    return healthy(hidden, torch.cat([head, head.new_zeros(rows, head.shape[1])]), *given, **rest)


def labels_of_sixteen_bits(healthy: Any, hidden: Tensor, head: Tensor, labels: Tensor, **rest: Any) -> Any:
    return healthy(hidden, head, labels % (1 << 16), **rest)


def top_p_keeps_one_more(healthy: Any, logits: Tensor, u: Tensor, *, top_p_B: Any, **rest: Any) -> Any:
    """The token at which the mass passes p stays, and the one behind it too."""
    if top_p_B is None:
        return healthy(logits, u, top_p_B=None, **rest)
    tempered = logits.float() / rest["temperature_B"].float().clamp_min(1e-3)[:, None]
    probs = tempered.cpu().softmax(-1).sort(-1, descending=True).values
    before = probs.cumsum(-1) - probs
    counts = (before < top_p_B.cpu()[:, None]).sum(-1, keepdim=True)
    more = before.gather(1, counts.clamp(max=probs.shape[1] - 1))[:, 0] + 1e-6
    p = torch.where(top_p_B.cpu() < 1, more.clamp(max=1 - 1e-6), torch.ones_like(more))
    return healthy(logits, u, top_p_B=p.to(logits.device), **rest)


def numbers_ignored(healthy: Any, logits: Tensor, u: Tensor, **rest: Any) -> Any:
    """Draws with its own numbers and not with those that the seed gave."""
    return healthy(logits, torch.full_like(u, 0.5), **rest)


def log_probs_before_the_filters(healthy: Any, logits: Tensor, u: Tensor, **rest: Any) -> Any:
    ids, _, plain = healthy(logits, u, **rest)
    return ids, plain.clone(), plain


def temperature_zero_draws(
    healthy: Any, logits: Tensor, u: Tensor, *, temperature_B: Tensor, **rest: Any
) -> Any:
    """Greedy rows are drawn under a temperature of one."""
    warm = torch.where(temperature_B == 0, torch.ones_like(temperature_B), temperature_B)
    return healthy(logits, u, temperature_B=warm, **rest)


def decay_in_the_gradient(
    healthy: Any, params: Sequence[Tensor], grads: Sequence[Tensor], *states: Any,
    weight_decays: Sequence[float], grad_scale: float, **rest: Any,
) -> None:  # fmt: skip
    """L2 in place of decoupled decay."""
    rows = zip(params, grads, weight_decays, strict=True)
    changed = [grad + decay * param / grad_scale for param, grad, decay in rows]
    none = [0.0] * len(changed)
    healthy(params, changed, *states, weight_decays=none, grad_scale=grad_scale, **rest)


def bias_correction_forgotten(healthy: Any, *given: Any, step: int, **rest: Any) -> None:
    healthy(*given, step=10**6, **rest)


def gradient_scale_ignored(healthy: Any, *given: Any, grad_scale: float, **rest: Any) -> None:
    healthy(*given, grad_scale=1.0, **rest)


def copies_left_behind(healthy: Any, *given: Any, copies: Sequence[Any], **rest: Any) -> None:
    """The weights that the model computes with stay as they were."""
    healthy(*given, copies=[None] * len(copies), **rest)


def first_tensor_alone(
    healthy: Any, *lists: Sequence[Tensor], weight_decays: Any, copies: Any, **rest: Any
) -> None:
    """A list too long for one launch."""
    healthy(*(row[:2] for row in lists), weight_decays=weight_decays[:2], copies=copies[:2], **rest)
