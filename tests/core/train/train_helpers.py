"""Completions sampled at random and trainers over the reference ops."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_models import FAMILIES

from grpo_core.algo.loss import ppo_clip
from grpo_core.algo.packing import pack
from grpo_core.backend import reference_backend
from grpo_core.config import AlgoConfig, TrainConfig
from grpo_core.train.base import TrainSetup
from grpo_core.train.trainer import NativeTrainer
from grpo_core.types import Batch, Completion, Sample, Scored

VOCAB = 53
# Token 0 is the padding token: transformers gives its embedding no gradient.


def make_scored(seed: int = 0, groups: int = 3, size: int = 4, longest: int = 7) -> list[Scored]:
    """Random groups; lengths from 1 to `longest`, the last completion of the first group has no token."""
    rng = random.Random(seed)
    found = []
    for group in range(groups):
        prompt = tuple(rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 6)))
        for index in range(size):
            length = 0 if (group, index) == (0, size - 1) else rng.randint(1, longest)
            ids = tuple(rng.randrange(1, VOCAB) for _ in range(length))
            found.append(scored_of(group, prompt, ids, index=index, advantage=rng.gauss(0, 1)))
    return found


def scored_of(
    group: int, prompt: tuple[int, ...], ids: tuple[int, ...], *, index: int = 0, advantage: float = 1.0
) -> Scored:
    """A completion with rollout log-probs near those of a uniform policy."""
    completion = Completion(
        prompt_id=group, index=index, token_ids=ids, text="", finish_reason="stop", weight_version=0,
        logprobs=tuple(-4.0 + 0.01 * i for i in range(len(ids))), logprobs_t1=(),
    )  # fmt: skip
    return Scored(
        sample=Sample(id=f"s{group}"), prompt_token_ids=prompt, completion=completion, rewards={},
        reward=0.0, advantage=advantage,
    )  # fmt: skip


def setup_of(
    hf_config: dict[str, Any], folder: Path, *, algo: dict[str, Any], temperature: float, total_steps: int,
    group: Any, train: dict[str, Any],
) -> TrainSetup:  # fmt: skip
    """What a trainer on the reference ops is built from."""
    family = FAMILIES["llama"]()
    arch = family.arch(hf_config)
    return TrainSetup(
        arch=arch, weight_map=family.weights(arch), backend=reference_backend(), device=torch.device("cpu"),
        model_path=str(folder), train=TrainConfig(**{"dtype": "float32", "lr": 1e-2, **train}),
        algo=AlgoConfig(**algo), temperature=temperature, group=group, total_steps=total_steps,
    )  # fmt: skip


def packed(scored: Sequence[Scored], micro_tokens: int = 1000, share_prompt: bool = True) -> list[Batch]:
    """Micro-batches on the CPU."""
    return pack(scored, micro_tokens=micro_tokens, share_prompt=share_prompt, device="cpu")


def loss_of(trainer: NativeTrainer) -> Callable[..., Any]:
    """The clipped surrogate under the trainer's settings."""
    return partial(ppo_clip, config=trainer.setup.algo)


def weights_of(trainer: NativeTrainer) -> dict[str, torch.Tensor]:
    """Copies of the policy's weights in float32 (the exact masters), by neutral name."""
    masters_P = trainer.flat.read_masters(
        0, trainer.flat.weights_P.shape[0], torch.empty(trainer.flat.weights_P.shape)
    )
    return {name: view.clone() for name, view in trainer.flat.views(masters_P).items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all tensors."""
    assert a.keys() == b.keys()
    return max(float((a[name].detach().double() - b[name].detach().double()).abs().max()) for name in a)
