"""Checkpoints on disk: round trips through transformers, shards, and every way a download is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, decoder_of, packed_logits, random_sequences, tiny_hf_model
from transformers import AutoModelForCausalLM

from grpo_core.errors import CheckpointError
from grpo_core.model.checkpoint_io import (
    INDEX,
    SINGLE,
    copy_side_files,
    load_checkpoint,
    read_shapes,
    read_tensors,
    write_checkpoint,
)
from grpo_core.model.hf_config import read_hf_config
from grpo_core.model.transformer import Decoder


def saved(folder: Path, family: str = "qwen2", *, shard: str = "50GB", **settings: Any) -> Any:
    model = tiny_hf_model(family, **settings)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def loaded(folder: Path, backend: Any, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Any]:
    config = read_hf_config(folder)
    family = FAMILIES[config["model_type"]]()
    arch = family.arch(config)
    decoder = Decoder(arch, backend, device="cpu", dtype=dtype)
    load_checkpoint(folder, family.weights(arch), dict(decoder.named_parameters()))
    return decoder, family.weights(arch)


ROUND_TRIPS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3-tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("limit", [1 << 40, 6000])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_export_loads_in_transformers_with_identical_logits(
    name: str, limit: int, backend: Any, tmp_path: Path
) -> None:
    model = saved(tmp_path / "in", name.split("-")[0], **ROUND_TRIPS[name])
    decoder, table = loaded(tmp_path / "in", backend)
    write_checkpoint(
        tmp_path / "out",
        table.export(dict(decoder.named_parameters())),
        decoder.arch.hf_config,
        max_shard_bytes=limit,
    )
    shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert shards == 1 if limit > 6000 else shards > 3
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_sequences([11], 53)[0][None]
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


def test_shards_written_by_transformers_are_read(backend: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, shard="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    decoder, _ = loaded(tmp_path, backend)
    sequences = random_sequences([9], 53)
    with torch.no_grad():
        assert torch.equal(
            packed_logits(decoder, sequences), packed_logits(decoder_of(model, backend), sequences)
        )


def test_config_names_the_dtype_of_the_weights(backend: Any, tmp_path: Path) -> None:
    saved(tmp_path / "in")
    decoder, table = loaded(tmp_path / "in", backend, torch.bfloat16)
    write_checkpoint(tmp_path / "out", table.export(dict(decoder.named_parameters())), decoder.arch.hf_config)
    config = read_hf_config(tmp_path / "out")
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_second_write_leaves_nothing_of_the_first(backend: Any, tmp_path: Path) -> None:
    tensors = {f"w{index}": torch.full((10,), float(index)) for index in range(4)}
    write_checkpoint(tmp_path, tensors.items(), {}, max_shard_bytes=40)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 4
    write_checkpoint(tmp_path, [("w", torch.ones(2))], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SINGLE]
    write_checkpoint(tmp_path, tensors.items(), {}, max_shard_bytes=80)
    assert SINGLE not in [path.name for path in tmp_path.iterdir()]
    assert {name: tensor.tolist() for name, tensor in read_tensors(tmp_path)} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_source_that_reuses_its_buffer_is_copied(tmp_path: Path) -> None:
    buffer = torch.zeros(3)

    def stream() -> Any:
        for index in range(3):
            buffer.fill_(index)
            yield f"w{index}", buffer

    write_checkpoint(tmp_path, stream(), {})
    assert {name: tensor[0].item() for name, tensor in read_tensors(tmp_path)} == {"w0": 0, "w1": 1, "w2": 2}


def test_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [("w", torch.ones(2))], {"model_type": "old"})

    def stream() -> Any:
        yield "w", torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, stream(), {"model_type": "new"}, max_shard_bytes=1)
    assert dict(read_tensors(tmp_path))["w"].tolist() == [1.0, 1.0]
    assert read_hf_config(tmp_path)["model_type"] == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SINGLE]


def test_shapes_are_read_without_data(tmp_path: Path) -> None:
    model = saved(tmp_path, shard="10KB")
    assert dict(read_shapes(tmp_path)) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        list(read_tensors(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="convert the weights to safetensors"):
        list(read_tensors(tmp_path))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, shard="10KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        next(read_tensors(tmp_path))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("shard", ["50GB", "10KB"])
def test_truncated_file_is_told_before_any_weight_changes(
    keep: int, shard: str, backend: Any, tmp_path: Path
) -> None:
    saved(tmp_path, shard=shard)
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    victim.write_bytes(victim.read_bytes()[:keep])
    config = read_hf_config(tmp_path)
    family = FAMILIES["qwen2"]()
    decoder = Decoder(family.arch(config), backend, device="cpu", dtype=torch.float32)
    decoder.init_weights(0)
    before = [p.clone() for p in decoder.parameters()]
    with pytest.raises(CheckpointError, match=f"{victim.name} is damaged"):
        load_checkpoint(tmp_path, family.weights(decoder.arch), dict(decoder.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))


def test_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        list(read_tensors(tmp_path))


def test_index_that_promises_more_than_its_shards_hold(tmp_path: Path) -> None:
    saved(tmp_path, shard="10KB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.ghost\.weight"):
        next(read_tensors(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", '{"metadata": {}}', "{"])
def test_unreadable_index(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        next(read_tensors(tmp_path))


def test_weights_of_another_model_change_nothing(backend: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    family = FAMILIES["llama"]()
    decoder = Decoder(
        family.arch(tiny_hf_model("llama").config.to_dict()), backend, device="cpu", dtype=torch.float32
    )
    decoder.init_weights(0)
    before = decoder.embed.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"unknown to the model: model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        load_checkpoint(tmp_path, family.weights(decoder.arch), dict(decoder.named_parameters()))
    assert torch.equal(before, decoder.embed.weight)


def test_side_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "training_args.bin", SINGLE, "config.json"):
        (tmp_path / "in" / name).write_text(name)
    assert copy_side_files(tmp_path / "in", tmp_path / "out") == ["tokenizer.json", "chat_template.jinja"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_unreadable_config_json(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_hf_config(tmp_path)
