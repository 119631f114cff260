"""The references of `moe.*` against the routers and experts of transformers, on random weights."""

from __future__ import annotations

from typing import Any

import moe_checks as check
import pytest
import torch
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from grpo_core.ops.reference import moe

C, F, X, K = 24, 10, 12, 3


def deepseek_config(**changes: Any) -> DeepseekV3Config:
    sizes = {
        "hidden_size": C, "moe_intermediate_size": F, "n_routed_experts": X, "num_experts_per_tok": K,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    }  # fmt: skip
    return DeepseekV3Config(**{**sizes, **changes})


def fill(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return module


def compare(
    weights_Tk: torch.Tensor, ids_Tk: torch.Tensor, theirs_Tk: torch.Tensor, their_ids_Tk: torch.Tensor
) -> None:
    """Equal sets of experts, and equal weights of each. Theirs come in any order."""
    order, their_order = ids_Tk.argsort(1), their_ids_Tk.argsort(1)
    assert torch.equal(ids_Tk.gather(1, order), their_ids_Tk.gather(1, their_order))
    # float32: exp, a division, a sum of K and a division, at 2^-24 each.
    torch.testing.assert_close(
        weights_Tk.gather(1, order), theirs_Tk.gather(1, their_order), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("groups", [(4, 2), (1, 1), (3, 1)])
def test_deepseek_router(groups: tuple[int, int], norm: bool) -> None:
    config = deepseek_config(n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm)
    router = fill(deepseek.DeepseekV3TopkRouter(config))
    x = check.randn(64, C, dtype=torch.float32, seed=1)
    logits, theirs, their_ids = router(x)
    weights, ids = moe.route(
        logits, top_k=K, score="sigmoid", bias_X=router.e_score_correction_bias, num_groups=groups[0],
        topk_groups=groups[1], norm=norm, scale=2.5, ids_Tk=None,
    )  # fmt: skip
    compare(weights, ids, theirs, their_ids)


@pytest.mark.parametrize("norm", [True, False])
def test_qwen_router(norm: bool) -> None:
    config = Qwen3MoeConfig(hidden_size=C, num_experts=X, num_experts_per_tok=K, norm_topk_prob=norm)
    logits, theirs, their_ids = fill(qwen.Qwen3MoeTopKRouter(config))(
        check.randn(64, C, dtype=torch.float32, seed=1)
    )
    weights, ids = moe.route(logits, **{**check.FREE, "score": "softmax", "top_k": K, "norm": norm})
    compare(weights, ids, theirs, their_ids)


@pytest.mark.parametrize("family", ["deepseek", "qwen"])
def test_experts_and_gradients(family: str) -> None:
    config: Any
    if family == "deepseek":
        config = deepseek_config()
        config._experts_implementation = "eager"
        module = deepseek.DeepseekV3Experts(config)
    else:
        config = Qwen3MoeConfig(hidden_size=C, moe_intermediate_size=F, num_experts=X, num_experts_per_tok=K)
        config._experts_implementation = "eager"
        module = qwen.Qwen3MoeExperts(config)
    fill(module).double()
    x, ids = check.randn(20, C, dtype=torch.float64, seed=1), check.random_ids(20, X, K)
    weights = check.randn(20, K, dtype=torch.float64, seed=2).abs()
    theirs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    wanted = module(theirs[0], ids, theirs[1])
    g_y = check.randn(20, C, dtype=torch.float64, seed=3)
    wanted.backward(g_y)
    weight_leaves = [module.gate_up_proj, module.down_proj]
    ours = [t.detach().clone().requires_grad_() for t in (x, weights, *weight_leaves)]
    rows, counts, record = moe.dispatch(ours[0], ids, num_experts=X, group=None)
    got = moe.combine(moe.experts(rows, ours[2], ours[3], counts), ours[1], record)
    got.backward(g_y)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for leaf, other in zip(ours, [*theirs, *weight_leaves], strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)
