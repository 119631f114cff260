"""Trainers of tiny models with experts, and completions with records of a rollout's routing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import FAMILIES, tiny_hf_model
from train_helpers import make_scored

from grpo_core.backend import reference_backend
from grpo_core.config import AlgoConfig, TrainConfig
from grpo_core.ops.reference.collectives import OneRank
from grpo_core.train.base import TrainSetup
from grpo_core.train.routing import expert_sizes
from grpo_core.train.trainer import NativeTrainer
from grpo_core.types import RoutedExperts, Scored


def write_mixture(family: str, folder: Path, **settings: Any) -> Path:
    """The checkpoint of a tiny random model, as transformers writes it."""
    tiny_hf_model(family, rms_norm_eps=1e-2, **settings).save_pretrained(folder)
    return folder


def mixture_trainer(
    folder: Path, *, algo: dict[str, Any] | None = None, group: Any = None, **train: Any
) -> NativeTrainer:
    """A trainer on the reference ops; keyword arguments are settings of train."""
    import json

    config = json.loads((folder / "config.json").read_text())
    family = FAMILIES[config["model_type"]]()
    arch = family.arch(config)
    return NativeTrainer(
        TrainSetup(
            arch=arch, weight_map=family.weights(arch), backend=reference_backend(),
            device=torch.device("cpu"), model_path=str(folder),
            train=TrainConfig(**{"dtype": "float32", "lr": 1e-2, **train}), algo=AlgoConfig(**algo or {}),
            temperature=1.0, group=group or OneRank(), total_steps=100,
        )
    )  # fmt: skip


def routed_rows(trainer: NativeTrainer, tokens: Sequence[int]) -> torch.Tensor:
    """The experts of a sequence by the trainer's own weights, int16 [T, M, k]."""
    sizes = expert_sizes(trainer.setup.arch)
    assert sizes is not None
    record = torch.full((len(tokens), *sizes), -1, dtype=torch.int16)
    with torch.no_grad():
        trainer.policy(
            torch.tensor(tokens), torch.arange(len(tokens)), parents=None, max_seqlen=len(tokens),
            cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32), recompute=False,
            record_TMk=record,
        )  # fmt: skip
    return record


def recorded(trainer: NativeTrainer, *, moved: float = 0.0, seed: int = 0) -> list[Scored]:
    """Completions whose records are the trainer's own routing; a share `moved` of the pairs of a token and
    a layer has its experts shifted by one."""
    experts = next(
        layer.ffn.num_experts for layer in trainer.setup.arch.layers if hasattr(layer.ffn, "top_k")
    )
    rng = random.Random(seed)
    prompts: dict[int, torch.Tensor] = {}
    found = []
    for item in make_scored():
        prompt, ids = item.prompt_token_ids, item.completion.token_ids
        rows = routed_rows(trainer, (*prompt, *ids)).clone()
        for token in range(rows.shape[0]):
            for layer in range(rows.shape[1]):
                if rng.random() < moved:
                    rows[token, layer] = (rows[token, layer] + 1) % experts
        shared = prompts.setdefault(item.completion.prompt_id, rows[: len(prompt)])
        own = rows[len(prompt) :].clone()
        own[-1:] = -1
        records = RoutedExperts(prompt_PMk=shared, completion_NMk=own)
        found.append(replace(item, completion=replace(item.completion, routed_experts=records)))
    return found
