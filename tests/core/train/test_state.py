"""Save, load, sleep, wake, and what the trainer says it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import distance, loss_of, make_scored, packed, weights_of

from grpo_core.errors import CheckpointError
from grpo_core.train.trainer import NativeTrainer

Make = Callable[..., NativeTrainer]


def advance(trainer: NativeTrainer, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.step(packed(make_scored(seed=step), 25), loss_of(trainer))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_trainer_continues_bit_for_bit(dtype: str, trainer_of: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 2}
    straight = trainer_of(**settings)
    advance(straight, 0, 3)
    straight.save(tmp_path / "step-3")
    saved = weights_of(straight)
    advance(straight, 3, 5)

    resumed = trainer_of(**settings)
    resumed.load(tmp_path / "step-3")
    assert distance(weights_of(resumed), saved) == 0.0
    advance(resumed, 3, 5)
    assert distance(weights_of(resumed), weights_of(straight)) == 0.0
    assert torch.equal(resumed.optimizer.exp_avg_sq_P, straight.optimizer.exp_avg_sq_P)
    assert distance(weights_of(straight), saved) > 0


def test_transformers_loads_what_was_saved(hf_model: Any, trainer_of: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = trainer_of(dtype="bfloat16")
    advance(trainer, 0, 1)
    trainer.save(tmp_path / "c")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert loaded.dtype == torch.bfloat16
    assert distance(dict(loaded.named_parameters()), dict(trainer.weights())) == 0.0


def test_load_refuses_another_dtype(trainer_of: Make, tmp_path: Path) -> None:
    trainer_of(dtype="bfloat16").save(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"train\.dtype=bfloat16"):
        trainer_of(dtype="float32").load(tmp_path / "c")


@pytest.mark.parametrize("break_it", ["trainer", "json", "optimizer", "truncate", "weights", "layer"])
def test_load_refuses_a_folder_that_is_not_whole_and_changes_nothing(
    break_it: str, trainer_of: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    source = trainer_of()
    advance(source, 0, 1)
    source.save(folder)
    if break_it == "trainer":
        (folder / "trainer.json").unlink()
    elif break_it == "json":
        (folder / "trainer.json").write_text(json.dumps({"format": 1})[:-3])
    elif break_it == "optimizer":
        (folder / "optimizer.safetensors").unlink()
    elif break_it == "truncate":
        data = (folder / "optimizer.safetensors").read_bytes()
        (folder / "optimizer.safetensors").write_bytes(data[: len(data) // 2])
    elif break_it == "weights":
        (folder / "model.safetensors").unlink()
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "optimizer.safetensors")
        tensors.pop("exp_avg.norm.weight")
        save_file(tensors, folder / "optimizer.safetensors")
    trainer = trainer_of()
    before = weights_of(trainer)
    with pytest.raises(CheckpointError):
        trainer.load(folder)
    assert distance(weights_of(trainer), before) == 0.0
    assert trainer.optimizer.step_count == 0


@pytest.mark.parametrize("keep", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sleep_frees_the_state_and_wake_brings_it_back(keep: str, dtype: str, trainer_of: Make) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "options": {"sleep": keep}, "algo": {"kl_coef": 0.1}}
    trainer, other = trainer_of(**settings), trainer_of(**settings)
    # without a KL in the loss, so that the batches need no reference log-probs
    for each in (trainer, other):
        each.setup = other.setup.__class__(
            **{f: getattr(each.setup, f) for f in each.setup.__slots__ if f != "algo"},
            algo=each.setup.algo.model_copy(update={"kl_coef": 0.0}),
        )
        advance(each, 0, 1)
    trainer.sleep()
    held = [trainer.flat.weights_P, trainer.optimizer.exp_avg_P, trainer.optimizer.exp_avg_sq_P]
    held += [trainer.policy.layers[0].mlp.down.weight]
    held += list(trainer.reference.parameters())
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in held)
    assert trainer.gradients.nbytes() == 0
    trainer.wake()
    batches = packed(make_scored())
    wanted = other.logprobs(batches, reference=True)
    assert torch.equal(trainer.logprobs(batches, reference=True)[0], wanted[0])
    advance(trainer, 1, 2)
    advance(other, 1, 2)
    assert distance(weights_of(trainer), weights_of(other)) == 0.0


def test_describe_counts_the_bytes(hf_model: Any, trainer_of: Make) -> None:
    count = sum(p.numel() for p in hf_model.parameters())
    trainer = trainer_of(dtype="bfloat16", algo={"kl_coef": 0.1})
    told = trainer.describe()
    assert told["parameters"] == count
    assert told["reference_bytes"] == 2 * count
    # gaps between parameters are below 64 elements each
    slack = 64 * len(trainer.flat.slots)
    assert 0 <= told["weights_bytes"] - 2 * count < 2 * slack
    assert told["masters_bytes"] == told["weights_bytes"]
    assert told["moments_bytes"] == 4 * told["weights_bytes"]
    assert told["gradients_bytes"] == 0
    trainer.gradients.begin(single=True)
    assert trainer.describe()["gradients_bytes"] == told["weights_bytes"]
    trainer.gradients.begin(single=False)
    assert trainer.describe()["gradients_bytes"] == 2 * told["weights_bytes"]
    exact = trainer_of(dtype="float32").describe()
    assert exact["masters_bytes"] == exact["reference_bytes"] == 0


def test_weights_are_views_in_the_compute_dtype(hf_model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(dtype="bfloat16")
    tensors = dict(trainer.weights())
    assert tensors.keys() == dict(hf_model.named_parameters()).keys()
    storage = trainer.flat.weights_P.untyped_storage().data_ptr()
    assert all(
        t.dtype == torch.bfloat16 and t.untyped_storage().data_ptr() == storage for t in tensors.values()
    )
