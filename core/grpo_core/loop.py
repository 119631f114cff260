"""GRPO, top to bottom (Shao et al. 2024, DeepSeekMath, section 4).

    prompts -> G completions each -> rewards -> advantages within the group -> policy update -> new weights

Everything that could differ between chips, engines or models was resolved before: this file is the
algorithm and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from .algo.packing import pack, split_mini_batches
from .config import Config
from .errors import GrpoError, NonFiniteError
from .metrics import completion_metrics, merge_step_metrics
from .seeds import derive_seed, derive_seeds
from .types import Batch, Completion, Prompt, Sample, Sampling, Scored, StepMetrics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .data.reward_runner import RewardRunner
    from .data.sampler import PromptOrder
    from .ops.collectives import Group
    from .ops.memory import Memory
    from .rollout.base import Rollout
    from .train.base import LossFn, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A sample with its prompt's token ids."""

    sample: Sample
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that the loop works with, already built."""

    config: Config
    questions: Sequence[Question]
    order: PromptOrder
    eval_questions: Sequence[Question]
    rollout: Rollout
    trainer: Trainer
    rewards: RewardRunner
    advantage: Callable[[Tensor, Tensor], Tensor]
    loss: LossFn
    group: Group
    memory: Memory
    device: torch.device


class Observer(Protocol):
    """What the loop tells the outside."""

    def on_step(self, step: int, metrics: Mapping[str, float], scored: Sequence[Scored]) -> None:
        """A finished step with its metrics; step 0 is the evaluation of the untrained model."""
        ...

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` finished steps."""
        ...


@dataclass(slots=True)
class Clock:
    """Seconds by phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def train(parts: Parts, observer: Observer, *, first_step: int) -> None:
    """Run steps `first_step`..`train.steps`.

    Raises the `GrpoError` of whatever part failed. Where the weights are those of a finished step, they are
    saved first, so that nothing is lost.
    """
    config = parts.config
    parts.rollout.load_weights(parts.trainer.weights(), first_step)
    if first_step == 0 and config.eval.every:
        observer.on_step(0, evaluate(parts), ())
    for step in range(first_step, config.train.steps):
        clock = Clock()
        began = time.perf_counter()
        scored: list[Scored] | None = None
        try:
            scored = experience(parts, step, clock)
            metrics = learn(parts, step, scored, clock)
        except GrpoError as error:
            # Of several updates, earlier ones may be done; and weights that diverged must not push good
            # checkpoints out.
            whole = scored is None or config.algo.mini_batches * config.algo.epochs == 1
            if step > first_step and whole and not isinstance(error, NonFiniteError):
                observer.save(step)
            raise
        with clock.phase("sync"):
            parts.rollout.load_weights(parts.trainer.weights(), step + 1)
        done = step + 1
        clock.seconds["step"] = time.perf_counter() - began
        everyone = gather(parts.group, scored)
        row = report(parts, everyone, metrics, clock)
        if config.eval.every and (done % config.eval.every == 0 or done == config.train.steps):
            try:
                row |= evaluate(parts)
            except GrpoError:
                observer.on_step(done, row, everyone)
                observer.save(done)
                raise
        observer.on_step(done, row, everyone)
        if done == config.train.steps or (config.run.save_every and done % config.run.save_every == 0):
            observer.save(done)


def experience(parts: Parts, step: int, clock: Clock) -> list[Scored]:
    """This rank's completions of the step's prompts, with rewards and advantages."""
    config = parts.config
    with clock.phase("rollout"):
        questions = draw(parts, step)
        completions = generate(parts, questions, step)
        if config.rollout.sleep:
            parts.rollout.sleep()
            parts.memory.empty_cache()
    with clock.phase("reward"):
        return score(parts, questions, completions, parts.advantage)


def draw(parts: Parts, step: int) -> dict[int, Question]:
    """This rank's questions of a step, by their place in the step."""
    count = parts.config.rollout.prompts
    places = range(parts.group.rank, count, parts.group.size)
    return {place: parts.questions[parts.order.at(step * count + place)] for place in places}


def generate(parts: Parts, questions: Mapping[int, Question], step: int) -> list[Completion]:
    """G completions of each question, in the order of questions and samples."""
    config = parts.config
    prompts = [
        Prompt(
            id=place,
            token_ids=question.token_ids,
            seeds=derive_seeds(config.run.seed, "rollout", step, place, count=config.algo.group_size),
        )
        for place, question in questions.items()
    ]
    found = parts.rollout.generate(prompts, sampling_of(config))
    return sorted(found, key=lambda completion: (completion.prompt_id, completion.index))


def sampling_of(config: Config) -> Sampling:
    """The rollout's sampling settings."""
    r = config.rollout
    return Sampling(
        max_tokens=r.max_tokens,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        stop=tuple(r.stop),
        stop_token_ids=tuple(r.stop_token_ids),
        min_tokens=r.min_tokens,
    )


def score(
    parts: Parts, questions: Mapping[int, Question], completions: Sequence[Completion],
    advantage: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[Scored]:  # fmt: skip
    """Completions with their rewards, whose weighted sum counts, and advantages where these are wanted."""
    import torch

    pairs = [(completion.text, questions[completion.prompt_id].sample) for completion in completions]
    values = parts.rewards.score(pairs)
    rewards = [parts.rewards.total(row) for row in values]
    advantages = [0.0] * len(rewards)
    if advantage is not None:
        groups_N = torch.tensor([completion.prompt_id for completion in completions], dtype=torch.int64)
        advantages = advantage(torch.tensor(rewards, dtype=torch.float64), groups_N).tolist()
    return [
        Scored(
            sample=sample, prompt_token_ids=questions[completion.prompt_id].token_ids, completion=completion,
            rewards=row, reward=reward, advantage=own,
        )
        for completion, (_, sample), row, reward, own in zip(
            completions, pairs, values, rewards, advantages, strict=True
        )
    ]  # fmt: skip


def learn(parts: Parts, step: int, scored: Sequence[Scored], clock: Clock) -> list[StepMetrics]:
    """The policy update: `epochs` passes over `mini_batches` parts of the step's completions."""
    algo, train_config = parts.config.algo, parts.config.train
    with clock.phase("train"):
        batches = [
            pack(
                part,
                micro_tokens=train_config.micro_tokens,
                share_prompt=train_config.share_prompt,
                device=parts.device,
            )
            for part in split_mini_batches(
                scored, algo.mini_batches, seed=derive_seed(parts.config.run.seed, "split", step)
            )
        ]
    with clock.phase("logprob"):
        if algo.mini_batches * algo.epochs > 1:
            batches = [parts.trainer.with_old(part) for part in batches]
        if algo.kl_coef > 0:
            batches = [with_reference(part, parts.trainer.logprobs(part, reference=True)) for part in batches]
    with clock.phase("train"):
        return [parts.trainer.step(part, parts.loss) for _ in range(algo.epochs) for part in batches]


def with_reference(batches: Sequence[Batch], logprobs: Sequence[Tensor]) -> list[Batch]:
    """Micro-batches that know the log-probs of the frozen reference."""
    return [replace(b, ref_logprobs_L=lp) for b, lp in zip(batches, logprobs, strict=True)]


def evaluate(parts: Parts) -> dict[str, float]:
    """One completion of each evaluation prompt at `eval.temperature`; mean rewards by source."""
    config = parts.config
    mine = dict(list(enumerate(parts.eval_questions))[parts.group.rank :: parts.group.size])
    prompts = [
        Prompt(id=i, token_ids=q.token_ids, seeds=(derive_seed(config.run.seed, "eval", i),))
        for i, q in mine.items()
    ]
    sampling = replace(
        sampling_of(config), temperature=config.eval.temperature, top_k=0, top_p=1.0, min_p=0.0
    )
    found = sorted(parts.rollout.generate(prompts, sampling), key=lambda completion: completion.prompt_id)
    everyone = gather(parts.group, score(parts, mine, found))
    metrics = {f"eval/{name}/excused": float(n) for name, n in parts.rewards.take_failures().items() if n}
    for source in sorted({item.sample.source for item in everyone}):
        rows = [item for item in everyone if item.sample.source == source]
        metrics[f"eval/{source}/reward"] = sum(item.reward for item in rows) / len(rows)
        metrics[f"eval/{source}/length"] = sum(len(item.completion.token_ids) for item in rows) / len(rows)
        for name in rows[0].rewards:
            metrics[f"eval/{source}/{name}"] = sum(item.rewards[name] for item in rows) / len(rows)
    return metrics


def gather(group: Group, scored: Sequence[Scored]) -> list[Scored]:
    """All ranks' completions in the order of prompts."""
    if group.size == 1:
        return list(scored)
    parts = group.gather_objects(list(scored))
    everyone: list[Scored] = [item for part in parts for item in part]  # type: ignore[attr-defined]
    return sorted(everyone, key=lambda item: (item.completion.prompt_id, item.completion.index))


def report(
    parts: Parts, scored: Sequence[Scored], metrics: Sequence[StepMetrics], clock: Clock
) -> dict[str, float]:
    """The step's metrics by their names in metrics.jsonl."""
    seconds = clock.seconds
    row = completion_metrics(scored)
    row |= merge_step_metrics(metrics)
    row |= {f"reward/{name}/excused": float(n) for name, n in parts.rewards.take_failures().items() if n}
    row |= {f"time/{name}": value for name, value in seconds.items()}
    sampled = sum(len(item.completion.token_ids) for item in scored)
    prompts = {item.completion.prompt_id: len(item.prompt_token_ids) for item in scored}
    row["throughput/rollout_tokens_per_s"] = sampled / max(seconds["rollout"], 1e-9)
    row["throughput/train_tokens_per_s"] = (sampled + sum(prompts.values())) / max(
        seconds["train"] + seconds["logprob"], 1e-9
    )
    row["memory/peak_gb"] = parts.memory.stats().peak / 1e9
    return row
