"""mla.decode in torch: scores and sums over the latents themselves, a shared prefix read once for its group.

The absorbed form of DeepSeek-V2 (arXiv 2405.04434, section 2.1.3): one key head of L + R numbers for all H
query heads, so that the products of a group with its prefix have group x H rows. Absorbed queries, scores and
sums stay in float32: rounded to bfloat16 on the way, a result is off by three times its own last rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.attention import accumulate

from .cache import DecodePlan
from .mla_cache import SharedLatentLayer, shared_latents

SCORES = 1 << 22
"""Most scores of a prefill's block of queries."""


def absorb(q_nope_BHN: Tensor, q_rope_BHR: Tensor, w_uk_HNL: Tensor) -> Tensor:
    """Queries of the rows [latent | rotary key], [B, H, L + R] in float32 or wider."""
    wide = accumulate(q_nope_BHN.dtype)
    q_HBL = torch.bmm(q_nope_BHN.transpose(0, 1).to(wide), w_uk_HNL.to(wide))
    return torch.cat([q_HBL.transpose(0, 1), q_rope_BHR.to(wide)], -1)


def values(o_BHL: Tensor, w_uv_HEL: Tensor) -> Tensor:
    """Weighted latents [B, H, L] as values [B, H, E] in the dtype of the weight."""
    o_HBE = torch.bmm(o_BHL.transpose(0, 1), w_uv_HEL.mT.to(o_BHL.dtype))
    return o_HBE.transpose(0, 1).to(w_uv_HEL.dtype)


def decode(
    q_nope_BHN: Tensor, q_rope_BHR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaDecode`."""
    layer = shared_latents(cache)
    B, H, _ = q_nope_BHN.shape
    if B == 0:
        return q_nope_BHN.new_empty(0, H, w_uv_HEL.shape[1])
    plan = layer.table.decode_plan(slots, seqlens_k)
    q_BHW = absorb(q_nope_BHN, q_rope_BHR, w_uk_HNL)
    own_BSW = layer.rows_XW.index_select(0, plan.own_rows).view(B, plan.S, -1).to(q_BHW.dtype)
    scores = [torch.bmm(q_BHW, own_BSW.mT)]
    prefix_NPW = None
    if plan.N:
        prefix_NPW = layer.rows_XW.index_select(0, plan.prefix_rows).view(plan.N, plan.P, -1).to(q_BHW.dtype)
        scores.insert(0, _by_prefix(q_BHW, prefix_NPW.mT, plan))
    scores_BHS = torch.cat(scores, -1)
    scores_BHS.mul_(scale).masked_fill_(plan.hidden(None)[:, None], -torch.inf)
    p_BHS = torch.softmax(scores_BHS, -1)
    o_BHL = torch.bmm(p_BHS[..., plan.P :], own_BSW[..., : layer.L])
    if prefix_NPW is not None:
        shared_BHL = _by_prefix(p_BHS[..., : plan.P], prefix_NPW[..., : layer.L], plan)
        o_BHL += shared_BHL.masked_fill_(plan.prefix_B.eq(0)[:, None, None], 0)
    return values(o_BHL, w_uv_HEL)


def _by_prefix(x_BHX: Tensor, prefix_NXY: Tensor, plan: DecodePlan) -> Tensor:
    """Products of each group with its prefix, [B, H, Y]; what sequences without one get is hidden later."""
    H, X = x_BHX.shape[1:]
    x_nMX = x_BHX.index_select(0, plan.members).view(plan.N, plan.M * H, X)
    return torch.bmm(x_nMX, prefix_NXY).view(plan.N * plan.M, H, -1).index_select(0, plan.member_at)


def absorbed(
    q_nope_QHN: Tensor, q_rope_QHR: Tensor, layer: SharedLatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor,
    rows_S: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention of the last Q of S tokens over their latents, in blocks of queries."""
    Q, H, _ = q_nope_QHN.shape
    S = rows_S.numel()
    q_QHW = absorb(q_nope_QHN, q_rope_QHR, w_uk_HNL)
    rows_SW = layer.rows_XW.index_select(0, rows_S).to(q_QHW.dtype)
    outputs = [q_QHW.new_empty(0, H, layer.L)]
    size = max(1, SCORES // (H * max(S, 1)))
    for first in range(0, Q, size):
        block_MW = q_QHW[first : first + size].flatten(0, 1)
        scores_MS = block_MW @ rows_SW.T
        mask_QS = causal_mask(block_MW.shape[0] // H, S - Q + first, S)
        scores_QHS = scores_MS.view(-1, H, S).mul_(scale).add_(mask_QS[:, None])
        p_MS = torch.softmax(scores_QHS, -1).flatten(0, 1)
        outputs.append((p_MS @ rows_SW[:, : layer.L]).view(-1, H, layer.L))
    return values(torch.cat(outputs), w_uv_HEL)


def causal_mask(Q: int, first: int, S: int) -> Tensor:
    """Added to scores [..., Q, S]: query i stands at position first + i."""
    hidden_QS = torch.arange(S) > torch.arange(first, first + Q)[:, None]
    return torch.zeros(Q, S).masked_fill_(hidden_QS, -torch.inf)
