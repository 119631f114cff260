"""The clipped surrogate and KL estimates against formulas in float64 and against TRL's and verl's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from grpo_core.algo.loss import kl_to_reference, ppo_clip
from grpo_core.config import AlgoConfig
from grpo_core.types import Batch

LENGTHS = [3, 0, 5, 1]
ADVANTAGES = [1.5, 9.0, -0.75, -2.0]


def make_batch(
    old: torch.Tensor | None, ref: torch.Tensor | None, advantages: list[float] = ADVANTAGES
) -> Batch:
    """Only what a loss reads; the packed tokens do not matter to it."""
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        tokens_T=none, positions_T=none, cu_seqlens=none, parents_S=none, max_seqlen=0, predict_L=none,
        labels_L=torch.zeros(sum(LENGTHS), dtype=torch.int64),
        completion_L=torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
        lengths_N=torch.tensor(LENGTHS), advantages_N=torch.tensor(advantages),
        rollout_logprobs_L=torch.zeros(sum(LENGTHS)), old_logprobs_L=old, ref_logprobs_L=ref,
    )  # fmt: skip


def draw(seed: int, spread: float) -> torch.Tensor:
    return -2.0 + spread * torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(seed))


def by_hand(
    logp: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, entropy: torch.Tensor, c: AlgoConfig
) -> tuple[np.ndarray, float]:
    """(loss of each token, gradient-free aggregate), one token at a time in float64."""
    losses: list[float] = []
    token = 0
    total = 0.0
    for length, a in zip(LENGTHS, ADVANTAGES, strict=True):
        for _ in range(length):
            p, q, r, h = (float(x[token]) for x in (logp, old, ref, entropy))
            ratio = math.exp(min(max(p - q, -20), 20))
            loss = max(-a * ratio, -a * min(max(ratio, 1 - c.clip_low), 1 + c.clip_high))
            if c.clip_dual and a < 0:
                loss = min(loss, -a * c.clip_dual)
            d = r - p
            kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[c.kl]
            losses.append(loss + c.kl_coef * kl - c.entropy_coef * h)
            total += losses[-1] / (length if c.aggregation == "sequence_mean" else 1)
            token += 1
    return np.array(losses), total / (3 if c.aggregation == "sequence_mean" else 9)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("dual", [0.0, 1.5])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_loss_equals_the_formula_in_float64(kl: str, dual: float, aggregation: str) -> None:
    c = AlgoConfig(
        clip_low=0.1,
        clip_high=0.3,
        clip_dual=dual,
        kl=kl,
        kl_coef=0.2,
        entropy_coef=0.05,
        aggregation=aggregation,
    )  # type: ignore[arg-type]
    logp, old, ref, entropy = draw(0, 1.0), draw(1, 1.0), draw(2, 1.0), draw(3, 1.0)
    terms = ppo_clip(logp, entropy, make_batch(old, ref), c)
    wanted, total = by_hand(logp, old, ref, entropy, c)
    # float32 exponentials of numbers below 5: a few units of the seventh digit
    np.testing.assert_allclose(terms.loss_L.numpy(), wanted, rtol=3e-6, atol=1e-6)
    denominator = 3 if aggregation == "sequence_mean" else 9
    assert float((terms.loss_L * terms.weight_L).sum() / denominator) == pytest.approx(total, rel=3e-6)


def test_gradient_equals_finite_differences_in_float64() -> None:
    c = AlgoConfig(clip_dual=2.0, kl_coef=0.1, entropy_coef=0.01)
    batch = make_batch(draw(1, 0.5).double(), draw(2, 1.0).double())
    inputs = (draw(0, 0.5).double().requires_grad_(), draw(3, 1.0).double().requires_grad_())

    def loss(logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return ppo_clip(logp, entropy, batch, c).loss_L

    assert torch.autograd.gradcheck(loss, inputs, eps=1e-7, atol=1e-5)


def test_on_policy_is_the_gradient_of_the_policy() -> None:
    logp = draw(0, 1.0).requires_grad_()
    terms = ppo_clip(logp, draw(3, 1.0), make_batch(None, None), AlgoConfig())
    advantages = torch.repeat_interleave(torch.tensor(ADVANTAGES), torch.tensor(LENGTHS))
    assert torch.equal(terms.loss_L.detach(), -advantages)
    terms.loss_L.sum().backward()
    assert torch.equal(logp.grad, -advantages)
    assert float(terms.sums["approx_kl"]) == float(terms.sums["clip_fraction"]) == 0.0


def test_equals_trl() -> None:
    """TRL 1.16 `GRPOTrainer._compute_loss` for loss_type "dapo" and "grpo", written with its masks."""
    logp, old, ref = draw(0, 0.4), draw(1, 0.4), draw(2, 0.4)
    width = max(LENGTHS)
    mask = torch.tensor([[1.0] * n + [0.0] * (width - n) for n in LENGTHS])
    padded = [torch.zeros(4, width).masked_scatter(mask.bool(), x) for x in (logp, old, ref)]
    per_token_logps, old_logps, ref_logps = padded
    advantages = torch.tensor(ADVANTAGES)
    coef_1 = torch.exp(per_token_logps - old_logps)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    loss = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])
    loss = loss + 0.04 * (torch.exp(ref_logps - per_token_logps) - (ref_logps - per_token_logps) - 1)
    dapo = (loss * mask).sum() / mask.sum()
    # TRL counts the sequence without a token as well (mean over 4), grpo-core does not
    grpo = ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() * 4 / 3
    for aggregation, wanted, count in (("token_mean", dapo, 9), ("sequence_mean", grpo, 3)):
        c = AlgoConfig(clip_high=0.28, kl_coef=0.04, aggregation=aggregation)  # type: ignore[arg-type]
        terms = ppo_clip(logp, torch.zeros(9), make_batch(old, ref), c)
        assert float((terms.loss_L * terms.weight_L).sum() / count) == pytest.approx(float(wanted), rel=1e-6)


def test_metrics_count_what_the_clips_cut() -> None:
    ratios = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0, 9.0, 1.1, 0.9])
    terms = ppo_clip(ratios.log(), torch.ones(9), make_batch(torch.zeros(9), None), AlgoConfig(clip_dual=3.0))
    # tokens 0-2 have A > 0: only the 2.0 is cut; 3-7 have A < 0: only the 0.5; the last one, 0.9, is not
    assert int(terms.sums["clip_fraction_high"]) == 1
    assert int(terms.sums["clip_fraction_low"]) == 1
    assert int(terms.sums["clip_fraction"]) == 2
    assert int(terms.sums["clip_dual_fraction"]) == 1
    assert float(terms.sums["entropy"]) == 9.0
    assert float(terms.maxima["ratio_max"]) == pytest.approx(9.0)
    approx_kl = float((ratios.double() - 1 - ratios.double().log()).sum())
    assert float(terms.sums["approx_kl"]) == pytest.approx(approx_kl, rel=1e-5)
    assert not any(value.requires_grad for value in (*terms.sums.values(), *terms.maxima.values()))


def test_a_log_ratio_of_a_thousand_stays_finite() -> None:
    logp = torch.tensor([900.0, -900.0] * 4 + [0.0], requires_grad=True)
    terms = ppo_clip(
        logp, torch.zeros(9), make_batch(torch.zeros(9), torch.zeros(9)), AlgoConfig(kl_coef=1.0)
    )
    terms.loss_L.sum().backward()
    assert torch.isfinite(terms.loss_L).all() and torch.isfinite(logp.grad).all()
    assert float(terms.maxima["ratio_max"]) == pytest.approx(math.exp(20), rel=1e-5)


def test_kl_estimates_are_unbiased_and_k3_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, generator=generator).double().log_softmax(-1)
    reference = torch.randn(6, generator=generator).double().log_softmax(-1)
    exact = float((policy.exp() * (policy - reference)).sum())
    for kind in ("k1", "k3"):
        # the expectation over the policy's own tokens, summed and not sampled
        expected = float((policy.exp() * kl_to_reference(policy, reference, kind)).sum())
        assert expected == pytest.approx(exact, abs=1e-12)
    assert (kl_to_reference(policy, reference, "k3") >= 0).all()
    assert (kl_to_reference(policy, reference, "k2") == 0.5 * (policy - reference) ** 2).all()
    assert float(kl_to_reference(torch.tensor(0.0), torch.tensor(8.0), "k3")) == 10.0
    with pytest.raises(ValueError, match="k4"):
        kl_to_reference(policy, reference, "k4")


def test_k2_slope_is_that_of_the_kl_on_policy_and_k1_has_none() -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    reference = torch.randn(6, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)

    def slope(value: Any) -> torch.Tensor:
        return torch.autograd.grad(value, logits)[0]

    policy = logits.log_softmax(-1)
    exact = slope((policy.exp() * (policy - reference)).sum())
    drawn = policy.detach().exp()
    policy = logits.log_softmax(-1)
    torch.testing.assert_close(slope((drawn * kl_to_reference(policy, reference, "k2")).sum()), exact)
    policy = logits.log_softmax(-1)
    torch.testing.assert_close(
        slope((drawn * kl_to_reference(policy, reference, "k1")).sum()), torch.zeros(6).double()
    )


def test_kl_without_reference_log_probs_is_told() -> None:
    with pytest.raises(ValueError, match="reference"):
        ppo_clip(torch.zeros(9), torch.zeros(9), make_batch(None, None), AlgoConfig(kl_coef=0.1))
