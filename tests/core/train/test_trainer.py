"""The optimizer step against transformers and torch.optim, and what must not change its result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from train_helpers import distance, loss_of, make_scored, packed, weights_of

from grpo_core.errors import ConfigError, GrpoError, NonFiniteError
from grpo_core.train.trainer import NativeTrainer
from grpo_core.types import Scored

Make = Callable[..., NativeTrainer]


def hf_logprobs(model: Any, item: Scored, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 log-probs and entropies of a completion's tokens by transformers, one sequence alone."""
    ids = [*item.prompt_token_ids, *item.completion.token_ids]
    logits = model(torch.tensor([ids])).logits[0, len(item.prompt_token_ids) - 1 : -1].float() / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, torch.tensor(item.completion.token_ids)[:, None])[:, 0], -(logp.exp() * logp).sum(
        -1
    )


def hf_step(model: Any, optimizer: Any, scored: list[Scored], max_norm: float, sequence_mean: bool) -> None:
    """A whole on-policy step written plainly: mean of -A exp(log p - log p.detach())."""
    parts = []
    for item in scored:
        if not item.completion.token_ids:
            continue
        logp, _ = hf_logprobs(model, item, 0.7)
        loss = -item.advantage * (logp - logp.detach()).exp()
        parts.append(loss.mean()[None] if sequence_mean else loss)
    optimizer.zero_grad()
    torch.cat(parts).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_three_steps_equal_transformers_with_torch_adamw(
    aggregation: str, hf_model: Any, trainer_of: Make
) -> None:
    model = copy.deepcopy(hf_model)
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-6,
    )  # fmt: skip
    trainer = trainer_of(
        lr=1e-3, weight_decay=0.1, beta2=0.95, eps=1e-6, max_grad_norm=0.5, temperature=0.7,
        algo={"aggregation": aggregation},
    )  # fmt: skip
    for step in range(3):
        scored = make_scored(seed=step)
        hf_step(model, optimizer, scored, 0.5, aggregation == "sequence_mean")
        trainer.step(packed(scored, micro_tokens=30), loss_of(trainer))
    mine, theirs = dict(trainer.weights()), dict(model.named_parameters())
    # AdamW divides by the gradient's own size: where |g| is near eps its rounding error (1e-8) is felt as
    # lr * 1e-8 / eps = 1e-5 a step; elsewhere both agree to 1e-7.
    assert distance(mine, theirs) < 1e-5
    moved = distance(mine, dict(hf_model.named_parameters()))
    assert moved > 2e-3


def test_logprobs_equal_transformers_under_temperature(hf_model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(temperature=0.7)
    scored = make_scored()
    [batch] = packed(scored)
    [logprobs_L] = trainer.logprobs([batch], reference=False)
    with torch.no_grad():
        wanted = torch.cat(
            [hf_logprobs(hf_model, item, 0.7)[0] for item in scored if item.completion.token_ids]
        )
    assert not logprobs_L.requires_grad
    # float32 over two tiny layers
    torch.testing.assert_close(logprobs_L, wanted, atol=2e-5, rtol=0)


ALGO = {"kl_coef": 0.1, "entropy_coef": 0.01, "clip_high": 0.3, "clip_dual": 3.0}


def run(
    trainer: NativeTrainer, scored: list[Scored], micro_tokens: int, share: bool, steps: int = 2
) -> dict[str, torch.Tensor]:
    """Steps off-policy (the second one, at least) with a reference; the trainer's masters afterwards."""
    batches = packed(scored, micro_tokens, share)
    batches = [
        replace(b, old_logprobs_L=old, ref_logprobs_L=ref)
        for b, old, ref in zip(
            batches, trainer.logprobs(batches, reference=False), trainer.logprobs(batches, reference=True),
            strict=True,
        )
    ]  # fmt: skip
    for _ in range(steps):
        trainer.step(batches, loss_of(trainer))
    return weights_of(trainer)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize(("micro_tokens", "share"), [(1, True), (20, True), (45, False), (1000, False)])
def test_result_does_not_depend_on_the_cut(
    micro_tokens: int, share: bool, aggregation: str, trainer_of: Make
) -> None:
    algo = ALGO | {"aggregation": aggregation}
    whole = run(trainer_of(lr=1e-3, eps=1e-5, algo=algo), make_scored(), 1000, True)
    cut = run(trainer_of(lr=1e-3, eps=1e-5, algo=algo), make_scored(), micro_tokens, share)
    # Sums in another order differ by float32 rounding (about 1e-8 of gradients below 1), which AdamW
    # scales by lr / eps = 100 at most, a step.
    assert distance(whole, cut) < 5e-6


def test_result_does_not_depend_on_the_order_of_completions(trainer_of: Make) -> None:
    scored = make_scored()
    forward = run(trainer_of(lr=1e-3, eps=1e-5, algo=ALGO), scored, 25, True)
    backward = run(trainer_of(lr=1e-3, eps=1e-5, algo=ALGO), scored[::-1], 25, True)
    assert distance(forward, backward) < 5e-6


def test_recompute_changes_nothing(trainer_of: Make) -> None:
    plain = run(trainer_of(algo=ALGO), make_scored(), 25, True)
    again = run(trainer_of(algo=ALGO, recompute=True), make_scored(), 25, True)
    assert distance(plain, again) == 0.0


def test_a_gradient_above_the_limit_is_clipped_by_its_norm(trainer_of: Make) -> None:
    # With eps far above every |g|, AdamW's first step is lr * g * scale / eps: linear in the gradient.
    free = trainer_of(lr=1.0, eps=1e3, max_grad_norm=0)
    tight = trainer_of(lr=1.0, eps=1e3, max_grad_norm=0.01)
    start = weights_of(free)
    norm = free.step(packed(make_scored()), loss_of(free)).values["grad_norm"]
    assert tight.step(packed(make_scored()), loss_of(tight)).values["grad_norm"] == norm > 0.01
    moves = [
        torch.cat([(weights_of(t)[n].double() - start[n]).reshape(-1) for n in start]).norm()
        for t in (free, tight)
    ]
    # the move is about 1e-3 of weights of size 1, so that float32 leaves three digits of it
    assert float(moves[1] / moves[0]) == pytest.approx(0.01 / norm, rel=1e-2)


def test_learning_rate_follows_the_schedule(trainer_of: Make) -> None:
    trainer = trainer_of(lr=0.01, schedule="linear", warmup_steps=2, total_steps=5)
    rates = [trainer.step(packed(make_scored()), loss_of(trainer)).values["lr"] for _ in range(5)]
    assert rates == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])


def test_metrics_of_an_on_policy_step(hf_model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(temperature=0.7)
    scored = make_scored()
    values = trainer.step(packed(scored, 25), loss_of(trainer)).values
    with torch.no_grad():
        pairs = [(hf_logprobs(hf_model, s, 0.7), s) for s in scored if s.completion.token_ids]
    entropy = torch.cat([e for (_, e), _ in pairs]).mean()
    gaps = torch.cat([p - torch.tensor(s.completion.logprobs) for (p, _), s in pairs])
    loss = torch.cat([torch.full_like(p, -s.advantage) for (p, _), s in pairs]).mean()
    assert values["entropy"] == pytest.approx(float(entropy), abs=1e-5)
    assert values["loss"] == pytest.approx(float(loss), abs=1e-6)
    assert values["policy_loss"] == pytest.approx(float(loss), abs=1e-6)
    assert values["mismatch/gap_mean"] == pytest.approx(float(gaps.abs().mean()), abs=1e-5)
    assert values["mismatch/gap_max"] == pytest.approx(float(gaps.abs().max()), abs=1e-5)
    assert values["approx_kl"] == values["clip_fraction"] == 0.0
    assert values["ratio_max"] == 1.0
    assert values["tokens"] == len(gaps)


def poisoned(scored: list[Scored], at: int) -> list[Scored]:
    return [replace(s, advantage=float("nan")) if i == at else s for i, s in enumerate(scored)]


def test_a_loss_that_is_nan_names_its_micro_batch_and_leaves_the_weights(trainer_of: Make) -> None:
    trainer = trainer_of()
    before = weights_of(trainer)
    batches = packed(poisoned(make_scored(), 5), micro_tokens=20)
    [bad] = [i for i, b in enumerate(batches, start=1) if b.advantages_N.isnan().any()]
    with pytest.raises(
        NonFiniteError, match=rf"loss of micro-batch {bad} of {len(batches)} on rank 0"
    ) as caught:
        trainer.step(batches, loss_of(trainer))
    assert isinstance(caught.value, FloatingPointError) and isinstance(caught.value, GrpoError)
    assert distance(before, weights_of(trainer)) == 0.0
    # the gradients of the micro-batches before it are forgotten: the next step is that of a fresh trainer
    trainer.step(packed(make_scored()), loss_of(trainer))
    fresh = trainer_of()
    fresh.step(packed(make_scored()), loss_of(fresh))
    assert distance(weights_of(trainer), weights_of(fresh)) == 0.0


def test_a_gradient_that_is_nan_names_its_micro_batch_and_leaves_the_weights(trainer_of: Make) -> None:
    trainer = trainer_of()
    before = weights_of(trainer)
    batches = packed(make_scored(), micro_tokens=20)

    def loss(logprobs_L: torch.Tensor, entropy_L: torch.Tensor, batch: Any) -> Any:
        terms = loss_of(trainer)(logprobs_L, entropy_L, batch)
        if batch is not batches[1]:
            return terms
        # finite itself, but its slope is infinite times zero
        return replace(terms, loss_L=terms.loss_L + (logprobs_L - logprobs_L.detach()).abs().sqrt())

    with pytest.raises(NonFiniteError, match=rf"gradient of micro-batch 2 of {len(batches)} on rank 0"):
        trainer.step(batches, loss)
    assert distance(before, weights_of(trainer)) == 0.0
    assert trainer.optimizer.step_count == 0


def test_micro_batches_without_a_loss_token_are_passed_over(trainer_of: Make) -> None:
    scored = make_scored()
    empty = packed([s for s in scored if not s.completion.token_ids])
    trainer, other = trainer_of(), trainer_of()
    trainer.step([*packed(scored), *empty], loss_of(trainer))
    other.step(packed([s for s in scored if s.completion.token_ids]), loss_of(other))
    # one sums in the flat buffer, the other does not; both hold float32
    assert distance(weights_of(trainer), weights_of(other)) == 0.0
    assert trainer.logprobs(empty, reference=False)[0].shape == (0,)
    with pytest.raises(GrpoError, match="nothing to train on"):
        trainer.step(empty, loss_of(trainer))


def test_no_reference_is_kept_without_a_kl_coefficient(trainer_of: Make) -> None:
    trainer = trainer_of()
    assert trainer.reference is None
    with pytest.raises(ValueError, match="kl_coef"):
        trainer.logprobs(packed(make_scored()), reference=True)


def test_the_reference_stays_where_the_policy_started(trainer_of: Make) -> None:
    trainer = trainer_of(algo={"kl_coef": 0.1})
    batches = packed(make_scored())
    [before] = trainer.logprobs(batches, reference=False)
    batches = [replace(batches[0], ref_logprobs_L=before)]
    values = trainer.step(batches, loss_of(trainer)).values
    assert values["kl"] == 0.0
    [after] = trainer.logprobs(batches, reference=False)
    [reference] = trainer.logprobs(batches, reference=True)
    assert torch.equal(reference, before)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"dtype": "auto"}, "train.dtype"), ({"temperature": 0.0}, "rollout.temperature"),
     ({"options": {"sleeep": 1}}, "sleeep"), ({"options": {"sleep": "moon"}}, "host nor disk")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_told(settings: dict[str, Any], words: str, trainer_of: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer_of(**settings)
    assert words in str(caught.value)
