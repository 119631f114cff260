"""Faults of latent attention, of the gated delta rule and of the short convolution."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CHUNK = 64


def rotary_part_forgotten(healthy: Any, q_nope: Tensor, q_rope: Tensor, *rest: Any, **named: Any) -> Any:
    return healthy(q_nope, 0 * q_rope, *rest, **named)


def latent_without_the_gradient_of_values(
    healthy: Any, q_nope: Tensor, q_rope: Tensor, latent: Tensor, *rest: Any, **named: Any
) -> Any:
    """The gradient through the keys alone."""
    whole = healthy(q_nope, q_rope, latent, *rest, **named)
    k_rope, w_uk, w_uv = rest
    frozen = healthy(q_nope, q_rope, latent, k_rope, w_uk, w_uv.detach(), **named)
    return whole.detach() + 0.5 * (frozen - frozen.detach())


def scale_of_the_latent(
    healthy: Any, q_nope: Tensor, q_rope: Tensor, cache: Any, w_uk: Tensor, w_uv: Tensor, *, scale: float,
    **rest: Any,
) -> Any:  # fmt: skip
    """The absorbed form with the scale of the absorbed query's own size."""
    own = float((w_uk.shape[2] + q_rope.shape[2]) ** -0.5)
    return healthy(q_nope, q_rope, cache, w_uk, w_uv, scale=own, **rest)


def state_carried_over(
    healthy: Any, *tensors: Tensor, cu_seqlens: Tensor, initial_state_SKDE: Tensor | None, **rest: Any
) -> Any:
    """Each packed sequence begins with the last state of the one before."""
    state = None if initial_state_SKDE is None else initial_state_SKDE[:1]
    rest.pop("final_state")
    outputs, states = [tensors[2].new_zeros(0, *tensors[2].shape[1:])], []
    for start, end in pairwise(cu_seqlens.tolist()):
        piece = torch.tensor([0, end - start], dtype=torch.int32).to(cu_seqlens.device)
        o, state = healthy(
            *(x[start:end] for x in tensors), cu_seqlens=piece, initial_state_SKDE=state, final_state=True,
            **rest,
        )  # fmt: skip
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs), torch.cat([state for state in states if state is not None])


def first_state_ignored(healthy: Any, *tensors: Tensor, initial_state_SKDE: Any, **rest: Any) -> Any:
    return healthy(*tensors, initial_state_SKDE=None, **rest)


def decay_lost_between_chunks(
    healthy: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, cu_seqlens: Tensor, **rest: Any
) -> Any:
    """The first token of a second chunk of 64 does not decay what came before."""
    keep = torch.ones(len(g), 1)
    for start, end in pairwise(cu_seqlens.tolist()):
        keep[start + CHUNK : end : CHUNK] = 0
    return healthy(q, k, v, g * keep.to(g.device, g.dtype), beta, cu_seqlens=cu_seqlens, **rest)


def strong_decay_overflows(
    healthy: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **rest: Any
) -> Any:
    """Divides by a product of decays, as the chunked form does, and clamps what underflows."""
    return healthy(q, k, v, g.clamp_min(-10.0), beta, **rest)


def states_by_row(healthy: Any, *tensors: Tensor, state_NKDE: Tensor, slots: Tensor, **rest: Any) -> Any:
    """The state of row b of the batch goes to slot b."""
    return healthy(*tensors, state_NKDE=state_NKDE, slots=torch.arange(len(slots)).to(slots.device), **rest)


def convolves_across_sequences(
    healthy: Any, x: Tensor, w: Tensor, *, cu_seqlens: Tensor, initial_state_SCW: Any, **rest: Any
) -> Any:
    """A sequence's first tokens see the last ones of its neighbour."""
    carried = initial_state_SCW
    if carried is not None:
        width, starts = w.shape[1] - 1, cu_seqlens.tolist()[:-1]
        rows = [
            x[start - width : start].T if start >= width else carried[i] for i, start in enumerate(starts)
        ]
        carried = torch.stack(rows) if rows else carried
    return healthy(x, w, cu_seqlens=cu_seqlens, initial_state_SCW=carried, **rest)


def kernel_turned_round(healthy: Any, x: Tensor, w: Tensor, **rest: Any) -> Any:
    return healthy(x, w.flip(1), **rest)


def window_not_moved(healthy: Any, x: Tensor, w: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Any:
    """The step computes with the last inputs and does not add its own to them."""
    return healthy(x, w, state_NCW=state_NCW.clone(), slots=slots)
