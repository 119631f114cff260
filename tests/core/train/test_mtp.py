"""Layers for multi-token prediction: passed on by checkpoints, and to engines where they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_hf_model
from train_helpers import loss_of, make_scored, packed

from grpo_core.backend import reference_backend
from grpo_core.config import AlgoConfig, TrainConfig
from grpo_core.model.hf_config import read_hf_config
from grpo_core.ops.reference.collectives import OneRank
from grpo_core.train.base import TrainSetup
from grpo_core.train.trainer import NativeTrainer

Tensors = dict[str, torch.Tensor]


def folder_of(family: str, path: Path) -> Tensors:
    """A tiny checkpoint with layers for multi-token prediction in it; returns those."""
    tiny_hf_model(family).save_pretrained(path)
    table = FAMILIES[family]().weights(FAMILIES[family]().arch(read_hf_config(path)))
    torch.manual_seed(3)
    kept = {name: torch.randn(shape) for name, shape in table.kept.items()}
    file = path / "model.safetensors"
    save_file({**load_file(file), **kept}, file, metadata={"format": "pt"})
    return kept


def trainer_of(family: str, path: Path, mtp: str) -> NativeTrainer:
    made = FAMILIES[family]()
    arch = made.arch(read_hf_config(path))
    setup = TrainSetup(
        arch=arch, weight_map=made.weights(arch), backend=reference_backend(), device=torch.device("cpu"),
        model_path=str(path), train=TrainConfig(dtype="float32", lr=1e-2, mtp=mtp), algo=AlgoConfig(),
        temperature=1.0, group=OneRank(), total_steps=4,
    )  # fmt: skip
    return NativeTrainer(setup)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("mtp", ["off", "load"])
def test_a_trained_checkpoint_holds_them_still(family: str, mtp: str, tmp_path: Path) -> None:
    kept = folder_of(family, tmp_path / "in")
    trainer = trainer_of(family, tmp_path / "in", mtp)
    table = trainer.setup.weight_map
    exported = {name for name, _ in trainer.weights()}
    assert kept.keys() & exported == (kept.keys() if mtp == "load" else set())
    held = trainer.describe()["mtp_bytes"]
    assert held == (sum(tensor.nbytes for tensor in kept.values()) if mtp == "load" else 0)
    trainer.step(packed(make_scored()), loss_of(trainer))
    trainer.save(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == load_file(tmp_path / "in" / "model.safetensors").keys()
    for name, tensor in kept.items():
        source = table.kept_copies.get(name)
        assert torch.equal(written[name], tensor if source is None else written[source]), name
    before = load_file(tmp_path / "in" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(written["model.embed_tokens.weight"], before)
    again = trainer_of(family, tmp_path / "in", mtp)
    again.load(tmp_path / "out")
    assert dict(again.weights()).keys() == exported
