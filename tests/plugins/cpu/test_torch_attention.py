"""Tiles of the torch offers of packed attention; their answers: tests/core/ops/test_attention_offers."""

from __future__ import annotations

import op_checks as check
import torch

from grpo_cpu import tiles
from grpo_cpu.attention import varlen


def test_no_tokens_at_all() -> None:
    q, k, v = check.qkv(0, 2, 1, 4, 4, torch.float32)
    q.requires_grad_()
    o = varlen(q, k, v, cu_seqlens=check.cumulative([0]), max_seqlen=0, scale=1.0, causal=True, window=None)
    o.sum().backward()
    assert o.shape == q.grad.shape == (0, 2, 4)


def test_tiles_hold_few_pads() -> None:
    """64 completions of all lengths from 1 to 64: padding to the longest would double the queries."""
    ends = [0]
    for length in (47, *range(1, 65)):
        ends.append(ends[-1] + length)
    plan = tiles.plan_tiles(tuple(ends), (-1, *[0] * 64), 9, 3, True, None, torch.bfloat16)
    assert sum(tile.n * tile.Q for tile in plan.tiles) < 1.25 * ends[-1]
    assert len(plan.tiles) < 20
