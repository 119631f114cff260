"""The references of `moe.*` by example and finite differences; `test_moe_offers` has what all share."""

from __future__ import annotations

from typing import Any

import moe_checks as check
import torch

from grpo_core.ops.reference import moe
from grpo_core.ops.reference.collectives import OneRank


def test_a_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0])
    weights, ids = moe.route(logits, **{**check.FREE, "top_k": 2, "norm": False, "bias_X": bias})
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, logits[:, [3, 0]].sigmoid())


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    # Group 1 has the single best expert and group 0 the best pair.
    logits = torch.tensor([[2.0, 2.0, 3.0, -9.0]])
    arguments = {**check.FREE, "top_k": 2, "num_groups": 2, "topk_groups": 1}
    assert moe.route(logits, **arguments)[1].tolist() == [[0, 1]]


def test_fixed_ids_keep_their_order_and_the_gradient_flows_to_every_logit_of_a_softmax() -> None:
    logits = check.randn(2, 6, dtype=torch.float64, seed=1).requires_grad_()
    fixed = torch.tensor([[5, 0, 3], [-1, -1, -1]])
    arguments = {**check.FREE, "score": "softmax", "norm": False, "top_k": 3}
    weights, ids = moe.route(logits, **{**arguments, "ids_Tk": fixed})
    assert ids[0].tolist() == [5, 0, 3]
    assert torch.equal(ids[1], moe.route(logits, **arguments)[1][1])
    weights[0, 0].backward()
    assert logits.grad is not None and bool((logits.grad[0] != 0).all())


def test_routing_takes_no_gradient_from_the_choice() -> None:
    logits = check.randn(3, 8, dtype=torch.float64, seed=2).requires_grad_()
    for norm in (False, True):
        for score in ("sigmoid", "softmax"):
            arguments = {**check.FREE, "score": score, "norm": norm, "top_k": 3}
            assert torch.autograd.gradcheck(lambda z: moe.route(z, **arguments)[0], (logits,))  # noqa: B023


def test_a_group_of_one_rank_is_no_group() -> None:
    x, ids = check.randn(5, 4, dtype=torch.float32, seed=0), check.random_ids(5, 6, 2)
    alone, counts, _ = moe.dispatch(x, ids, num_experts=6, group=None)
    rows, group_counts, record = moe.dispatch(x, ids, num_experts=6, group=OneRank())
    assert torch.equal(rows, alone) and torch.equal(counts, group_counts)
    torch.testing.assert_close(moe.combine(rows, torch.full((5, 2), 0.5), record), x)


def test_the_layer_by_finite_differences() -> None:
    inputs = [
        check.randn(4, 3, dtype=torch.float64, seed=0), check.randn(4, 6, dtype=torch.float64, seed=1),
        *check.weights_of(6, 3, 2, torch.float64),
    ]  # fmt: skip

    def run(x: Any, logits: Any, gate_up: Any, down: Any) -> Any:
        weights, ids = moe.route(logits, **{**check.FREE, "top_k": 2, "scale": 2.5})
        rows, counts, record = moe.dispatch(x, ids, num_experts=6, group=None)
        return moe.combine(moe.experts(rows, gate_up, down, counts), weights, record)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])
