"""Token sampling without float64 on the device: its sums are float32, the draw is made on the host.

The device reduces each row to sums of blocks; the host draws a block in float64, then a token of it. Rows
with a filter go to the host whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.reference.fused import sample_token as on_host

BLOCK = 256


@torch.no_grad()
def sample_token(
    logits_BV: Tensor, u_B: Tensor, *, temperature_B: Tensor, top_k_B: Tensor | None,
    top_p_B: Tensor | None, min_p_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.SampleToken`. A row without a finite largest logit raises
    `FloatingPointError` too."""
    filters = {"top_k_B": top_k_B, "top_p_B": top_p_B, "min_p_B": min_p_B}
    if any(given is not None for given in filters.values()):
        host = {name: None if given is None else given.cpu() for name, given in filters.items()}
        results = on_host(logits_BV.cpu(), u_B.cpu(), temperature_B=temperature_B.cpu(), **host)
    else:
        results = _draw(logits_BV, u_B.cpu().double(), temperature_B)
    ids_B, logprob_B, logprob1_B = (result.to(logits_BV.device) for result in results)
    return ids_B, logprob_B, logprob1_B


def _draw(logits_BV: Tensor, u_B: Tensor, temperature_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three results on the host."""
    x_BV = logits_BV.float()
    top_B1 = x_BV.amax(-1, keepdim=True)
    if not bool(top_B1.isfinite().all()) or bool(x_BV.isnan().any()):
        raise FloatingPointError("a row of logits holds NaN, +inf or nothing but -inf")
    x_BV = x_BV - top_B1
    V = x_BV.shape[1]
    # Lowest id among equals; an argmax of the device need not keep to that.
    greedy_B = torch.where(x_BV == 0, torch.arange(V, device=x_BV.device), V).amin(-1).cpu()
    cold_B = temperature_B == 0
    heat_B = torch.where(cold_B, torch.ones_like(temperature_B), temperature_B).float()
    blocks_BnK = _blocks((x_BV / heat_B[:, None]).exp())
    drawn_B, total_B = _invert(blocks_BnK, u_B)
    cold_B, heat_B = cold_B.cpu(), heat_B.cpu().double()
    ids_B = torch.where(cold_B, greedy_B, drawn_B)
    at_B = x_BV.gather(1, ids_B.to(x_BV.device)[:, None])[:, 0].cpu().double()
    plain_B = at_B - _blocks(x_BV.exp()).sum(-1).cpu().double().sum(-1).log()
    hot_B = at_B / heat_B - total_B.log()
    return ids_B, torch.where(cold_B, 0.0, hot_B).float(), plain_B.float()


def _blocks(weights_BV: Tensor) -> Tensor:
    B, V = weights_BV.shape
    return torch.nn.functional.pad(weights_BV, (0, -V % BLOCK)).view(B, -1, BLOCK)


def _invert(blocks_BnK: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """First id whose cumulative weight exceeds u times the total, and the total; both on the host."""
    B = blocks_BnK.shape[0]
    rows = torch.arange(B)
    cumulative_Bn = blocks_BnK.sum(-1).cpu().double().cumsum(-1)
    total_B = cumulative_Bn[:, -1]
    target_B = u_B * total_B
    block_B = _first_above(cumulative_Bn, target_B)
    before_B = torch.where(block_B > 0, cumulative_Bn[rows, block_B - 1], 0.0)
    device = blocks_BnK.device
    inner_BK = blocks_BnK[rows.to(device), block_B.to(device)].cpu().double()
    inside_B = _first_above(inner_BK.cumsum(-1), target_B - before_B)
    return block_B * BLOCK + inside_B, total_B


def _first_above(cumulative_Bn: Tensor, target_B: Tensor) -> Tensor:
    """Place of the step that holds the target; the last step that rises where rounding has passed it."""
    above_B = (cumulative_Bn <= target_B[:, None]).sum(-1)
    last_B = (cumulative_Bn < cumulative_Bn[:, -1:]).sum(-1)
    return torch.minimum(above_B, last_B)
