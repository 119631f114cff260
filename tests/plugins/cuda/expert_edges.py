"""Checks of the mixture's Triton kernels; called where Triton interprets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cache_checks
import latent_checks
import moe_checks
import op_oracles as oracle
import pytest
import torch
from torch import Tensor


def layer(dispatch: Callable[..., Any], dtype: torch.dtype, case: str) -> None:
    """Dispatch, experts and combine in a row."""
    from grpo_cuda import moe_triton

    assert dispatch is moe_triton.dispatch
    parts = (dispatch, moe_triton.experts, moe_triton.combine)
    moe_checks.check_layer(parts, dtype, moe_checks.IDS[case])


def rounding(dispatch: Callable[..., Any]) -> None:
    """One rounding of a combined row, and what is refused."""
    from grpo_cuda import moe_triton

    moe_checks.check_combine_rounds_once(dispatch, moe_triton.combine)
    for ids in ([[0], [6]], [[0], [-1]]):
        try:
            dispatch(torch.zeros(2, 32), torch.tensor(ids), num_experts=6, group=None)
        except ValueError:
            continue
        raise AssertionError(ids)


def main_grads_of_torchs_product(add: Callable[..., None], dtype: torch.dtype) -> None:
    """Our kernel under torch's grouped product."""
    from grpo_cuda import moe_grouped

    for case in ("uneven", "no rows"):
        moe_checks.check_main_grads(moe_grouped.experts, dtype, case, 64, 48)


def main_grads_are_not_rounded(experts: Callable[..., Tensor]) -> None:
    """A gradient of bfloat16 factors is exact to float32, while bfloat16 would keep 8 bits of it."""
    counts = torch.tensor([5, 0, 300])
    inputs = [moe_checks.randn(305, 32, dtype=torch.bfloat16, seed=0)]
    inputs += moe_checks.weights_of(3, 32, 16, torch.bfloat16)
    down = inputs[2].requires_grad_()
    main = torch.zeros(3, 32, 16)
    y = experts(inputs[0], inputs[1], down, counts, main_grad_down_XCF=main)
    g = moe_checks.randn(*y.shape, dtype=torch.bfloat16, seed=4)
    y.backward(g)
    from grpo_cuda import moe_triton

    plan = moe_triton.schedule(counts.cumsum(0, dtype=torch.int32), 305, 128)
    gate_up = moe_triton._by_rows(inputs[0], inputs[1].mT, plan)
    h = moe_triton.swiglu(gate_up).double()
    wanted = [
        part.double().t() @ rows
        for part, rows in zip(g.split(counts.tolist()), h.split(counts.tolist()), strict=True)
    ]
    # Sums of 300 products in float32.
    oracle.assert_close([main], [torch.stack(wanted)], torch.float32)
    assert down.grad is None


def tiles(schedule: Callable[..., Any], counts: list[int], tile_rows: int) -> None:
    """Every row is in one tile, of its own expert."""
    total = sum(counts)
    plan = schedule(torch.tensor(counts).cumsum(0, dtype=torch.int32), total, tile_rows)
    owner = [x for x, count in enumerate(counts) for _ in range(count)]
    seen = [-1] * total
    for expert, first, last in zip(
        plan.expert_M.tolist(), plan.first_M.tolist(), plan.last_M.tolist(), strict=True
    ):
        if expert < len(counts):
            for row in range(first, min(first + plan.rows, last)):
                assert seen[row] == -1
                seen[row] = expert
    assert seen == owner and 16 <= plan.rows <= tile_rows


def generation(decode: Callable[..., Tensor], dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Latents of pages that are shared, copied and used again, read by the kernel."""
    from grpo_cuda import mla, mla_triton
    from grpo_cuda.mla_cache import LatentPageCache

    _, _, rope, _, latent = sizes
    spec = replace(cache_checks.spec(dtype), num_key_value_heads=1, head_dim=latent + rope, v_head_dim=latent)
    model = latent_checks.LatentModel(
        cache=LatentPageCache(spec), decode=decode, prefill=mla.prefill, dtype=dtype, sizes=sizes
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_triton, "SPAN", 32)
        cache_checks.check_generation(model)
        slot = model.adopt(model.cache.allocate(90))
        model.write([slot], [70])
        model.check_decode([slot], None)
