"""A tiny checkpoint and trainers over the reference ops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_hf_model
from train_helpers import setup_of

from grpo_core.model.checkpoint_io import write_checkpoint
from grpo_core.ops.reference.collectives import OneRank
from grpo_core.train.trainer import NativeTrainer


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def hf_model() -> Any:
    """A float32 transformers Llama with tied embeddings; do not change it."""
    return tiny_hf_model("llama", tie_word_embeddings=True, num_hidden_layers=2)


@pytest.fixture(scope="session")
def model_folder(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("train") / "model"
    tensors = {name: tensor for name, tensor in hf_model.state_dict().items() if name != "lm_head.weight"}
    write_checkpoint(folder, tensors.items(), hf_model.config.to_dict())
    return folder


@pytest.fixture
def trainer_of(hf_model: Any, model_folder: Path) -> Callable[..., NativeTrainer]:
    """Make a trainer; keyword arguments are settings of train, `algo` a mapping of those of algo."""

    def make(
        *, algo: dict[str, Any] | None = None, temperature: float = 1.0, total_steps: int = 100,
        folder: Path | None = None, group: Any = None, **train: Any,
    ) -> NativeTrainer:  # fmt: skip
        return NativeTrainer(
            setup_of(
                hf_model.config.to_dict(), folder or model_folder, algo=algo or {}, temperature=temperature,
                total_steps=total_steps, group=group or OneRank(), train=train,
            )
        )  # fmt: skip

    return make
