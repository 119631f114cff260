"""Routing and experts in float64, from the papers.

Routing: DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16 and the group-limited choice of its code); the
experts: SwiGLU (Shazeer 2020), y_t = sum_i g_it FFN_i(u_t).
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose(
    scores: list[float], bias: list[float], top_k: int, num_groups: int, topk_groups: int
) -> list[int]:
    """Ids of one token, by sorting lists: largest first, then lowest id."""
    values = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(values) // num_groups
    worth = [sum(sorted(values[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(num_groups)]
    groups = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:topk_groups]
    allowed = [x for x in range(len(values)) if x // size in groups]
    return sorted(allowed, key=lambda x: (-values[x], x))[:top_k]


def route(
    logits_TX: Tensor, *, top_k: int, score: str, bias_X: Tensor | None, num_groups: int, topk_groups: int,
    norm: bool, scale: float, ids_Tk: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights and ids; the ids of each token are chosen by themselves. Differentiable."""
    T, X = logits_TX.shape
    z = logits_TX.double()
    scores = torch.sigmoid(z) if score == "sigmoid" else torch.softmax(z, 1)
    bias = [0.0] * X if bias_X is None else [float(b) for b in bias_X.double()]
    rows = [choose(row, bias, top_k, num_groups, topk_groups) for row in scores.tolist()]
    ids = torch.tensor(rows, dtype=torch.int64).view(T, top_k)
    if ids_Tk is not None:
        ids = torch.where(ids_Tk[:, :1] >= 0, ids_Tk.long(), ids)
    weights = scores.gather(1, ids)
    if norm:
        weights = weights / (weights.sum(1, keepdim=True) + (1e-20 if score == "sigmoid" else 0.0))
    return weights * scale, ids


def experts(rows_RC: Tensor, owners_R: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor) -> Tensor:
    """down (silu(gate row) * (up row)) with the weights of each row's owner."""
    F = down_XCF.shape[2]
    y_RC = (rows_RC.sum() + gate_up_XGC.sum() + down_XCF.sum()) * 0 + torch.zeros_like(rows_RC)
    for x in sorted(set(owners_R.tolist())):
        at = (owners_R == x).nonzero()[:, 0]
        gate = torch.einsum("fc,rc->rf", gate_up_XGC[x, :F], rows_RC[at])
        up = torch.einsum("fc,rc->rf", gate_up_XGC[x, F:], rows_RC[at])
        y_RC = y_RC.index_add(0, at, torch.einsum("cf,rf->rc", down_XCF[x], gate * torch.sigmoid(gate) * up))
    return y_RC


def layer(x_TC: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor) -> Tensor:
    """y_t = sum over the experts of a token, one place after the other."""
    y_TC = torch.zeros_like(x_TC)
    for place in range(ids_Tk.shape[1]):
        part_TC = experts(x_TC, ids_Tk[:, place], gate_up_XGC, down_XCF)
        y_TC = y_TC + weights_Tk[:, place, None] * part_TC
    return y_TC
