"""Builds what the loop works with from a planned run, and writes what the loop tells."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backend import Backend, bind
from .checkpoint import RunState, save_checkpoint
from .config import Config
from .data.datasets import open_dataset
from .data.reward_runner import RewardRunner
from .data.sampler import PromptOrder
from .errors import ConfigError, DataError
from .loop import Parts, Question
from .model.chat import Chat
from .model.checkpoint_io import copy_side_files
from .planning import PlannedRun
from .rollout.base import RolloutSetup
from .rundir import SAMPLES
from .seeds import derive_seed
from .train.base import TrainSetup
from .types import Sample, Scored

if TYPE_CHECKING:
    import torch

    from .ops.collectives import Group
    from .progress import Progress
    from .trackers import Tracker
    from .train.base import Trainer


def build_parts(planned: PlannedRun, *, resume_from: Path | None = None) -> Parts:
    """Import, bind and construct everything; the policy starts from the model or from a checkpoint.

    Raises the `GrpoError` of whatever cannot be built, before any step is run.
    """
    import torch

    config = planned.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    backend = bind(planned.plan)
    memory = backend.memory.allocator()
    device = planned.device.open(0)
    planned.device.seed(config.run.seed)
    chat = Chat.from_folder(planned.model_path, planned.family.chat(), thinking=config.data.thinking)
    questions, eval_questions = read_questions(planned, chat)
    registry = planned.catalogue.registry
    group = single_process(backend)
    trainer = build_trainer(planned, backend, device, group)
    if resume_from is not None:
        trainer.load(resume_from)
    rewards = RewardRunner(config.rewards, registry)
    rewards.check()
    longest = max(len(question.token_ids) for question in (*questions, *eval_questions))
    return Parts(
        config=config,
        questions=questions,
        order=PromptOrder(len(questions), derive_seed(config.run.seed, "order"), config.data.shuffle),
        eval_questions=eval_questions,
        rollout=build_rollout(planned, backend, chat, device, longest + config.rollout.max_tokens),
        trainer=trainer,
        rewards=rewards,
        advantage=named(registry.get("advantage", config.algo.advantage), config),
        loss=named(registry.get("loss", config.algo.loss), config),
        group=group,
        memory=memory,
        device=device,
    )


def named(function: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """A registered advantage or loss with the run's algorithm settings filled in."""
    return partial(function, config=config.algo)


def single_process(backend: Backend) -> Group:
    """The group of a run with one process."""
    collectives = backend.comm.collectives()
    collectives.init(rank=0, world=1, store="", timeout=60.0)
    return collectives.group([0])


def build_rollout(
    planned: PlannedRun, backend: Backend, chat: Chat, device: torch.device, max_model_len: int
) -> Any:
    """The rollout engine of the plan."""
    import torch

    config = planned.config
    setup = RolloutSetup(
        arch=planned.arch,
        weight_map=planned.family.weights(planned.arch),
        chat=chat,
        backend=backend,
        device=device,
        dtype=getattr(torch, planned.facts.rollout_dtype),
        model_path=str(planned.model_path),
        max_sequences=min(config.rollout.max_sequences, config.rollout.prompts * config.algo.group_size),
        max_model_len=max_model_len,
        options=config.rollout.options,
        # For replay, and for the metric that says whether replay is needed.
        record_experts=True,
        router_dtype=config.train.router_dtype,
        float64="float64" in planned.plan.device.dtypes,
        consistent=planned.facts.consistent,
        capture=getattr(planned.device, "capture", None) if planned.graph else None,
    )
    return backend.engine.rollout(setup)


def build_trainer(planned: PlannedRun, backend: Backend, device: torch.device, group: Group) -> Trainer:
    """The trainer of the plan."""
    config = planned.config
    resolved = config.train.model_copy(update={"dtype": planned.facts.train_dtype})
    setup = TrainSetup(
        arch=planned.arch,
        weight_map=planned.family.weights(planned.arch),
        backend=backend,
        device=device,
        model_path=str(planned.model_path),
        train=resolved,
        algo=config.algo,
        temperature=config.rollout.temperature,
        group=group,
        total_steps=config.train.steps * config.algo.epochs * config.algo.mini_batches,
        consistent=planned.facts.consistent,
    )
    return backend.engine.train(setup)


def read_questions(planned: PlannedRun, chat: Chat) -> tuple[list[Question], list[Question]]:
    """Training and evaluation prompts as token ids, overlong ones refused or dropped as configured."""
    config, registry = planned.config, planned.catalogue.registry
    train = encode(open_dataset(config.data.train, config.data, registry, "train"), chat, config, "train")
    if not config.eval.every:
        return train, []
    if not config.data.eval:
        raise ConfigError(
            "eval.every is set but data.eval is empty",
            why="there is nothing to evaluate on",
            fix="give data.eval a dataset, or set eval.every=0",
        )
    samples = open_dataset(config.data.eval, config.data, registry, "eval")
    chosen = [samples[i] for i in range(min(len(samples), config.eval.samples))]
    return train, encode(chosen, chat, config, "eval")


def encode(samples: Sequence[Sample], chat: Chat, config: Config, split: str) -> list[Question]:
    """Questions of a dataset; raises `DataError` for an overlong prompt or when none is left."""
    limit = config.data.max_prompt_tokens
    found: list[Question] = []
    dropped = 0
    for sample in samples:
        ids = tuple(chat.encode(sample.messages or sample.text))
        if len(ids) <= limit:
            found.append(Question(sample=sample, token_ids=ids))
        elif config.data.overlong == "drop":
            dropped += 1
        else:
            raise DataError(
                f"prompt {sample.id} of data.{split} has {len(ids)} tokens",
                why=f"data.max_prompt_tokens is {limit}",
                fix=f"set data.max_prompt_tokens={len(ids)} or more, or data.overlong=drop",
            )
    if not found:
        raise DataError(
            f"no prompt of data.{split} is left",
            why=f"all {dropped} are longer than data.max_prompt_tokens={limit}",
            fix="raise data.max_prompt_tokens",
        )
    if dropped:
        print(
            f"note: {dropped} prompts of data.{split} are longer than {limit} tokens: left out",
            file=sys.stderr,
        )
    return found


@dataclass(slots=True)
class RunWriter:
    """Implements the loop's `Observer`: logs, progress, samples and checkpoints of a run folder."""

    planned: PlannedRun
    parts: Parts
    run_dir: Path
    trackers: Sequence[Tracker]
    progress: Progress

    def on_step(self, step: int, metrics: Mapping[str, float], scored: Sequence[Scored]) -> None:
        """Write the step's row and some of its completions."""
        for tracker in self.trackers:
            tracker.log(step, metrics)
        self.progress.step(step, metrics)
        self._samples(step, scored)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`."""
        config = self.parts.config
        state = RunState(step=step, world=self.parts.group.size, plan_id=self.planned.plan.id)

        def write(folder: Path) -> None:
            self.parts.trainer.save(folder)
            copy_side_files(self.planned.model_path, folder)

        save_checkpoint(self.run_dir, state, write, keep=config.run.keep)

    def _samples(self, step: int, scored: Sequence[Scored]) -> None:
        count = self.parts.config.run.log_samples
        with (self.run_dir / SAMPLES).open("a", encoding="utf-8") as file:
            for item in scored[:: max(1, len(scored) // max(count, 1))][:count]:
                row = {
                    "step": step,
                    "prompt": item.sample.text or "\n".join(m["content"] for m in item.sample.messages),
                    "completion": item.completion.text,
                    "answer": item.sample.answer,
                    "reward": item.reward,
                    "rewards": dict(item.rewards),
                    "advantage": item.advantage,
                    "finish_reason": item.completion.finish_reason,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
