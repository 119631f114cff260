"""save_pretrained -> load -> export -> transformers, bit for bit, for every mixture and mixer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, by_checkpoint_name, tiny_hf_model

from grpo_core.errors import CheckpointError
from grpo_core.model.checkpoint_io import load_checkpoint, read_shapes, write_checkpoint
from grpo_core.model.hf_config import read_hf_config
from grpo_core.model.kept import read_kept, with_kept
from grpo_core.model.weights import WeightMap

Tensors = dict[str, torch.Tensor]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, biases, tied": ("qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_moe, every second layer": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, biases": ("deepseek_v3", {"attention_bias": True}),
    "deepseek_v3, tied": ("deepseek_v3", {"tie_word_embeddings": True}),
    "moonlight": ("deepseek_v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v3, all dense": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next, biases, tied": ("qwen3_next", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_next, a key head for each value head": ("qwen3_next", {"linear_num_value_heads": 2}),
    "qwen3_next, one key head": ("qwen3_next", {"linear_num_key_heads": 1}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    family, settings = MODELS[request.param]
    made = tiny_hf_model(family, **settings)
    # Experts start all alike in some versions, and a swap of two would not be seen.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 3:
                parameter.copy_(torch.randn_like(parameter))
    return made


def table_of(folder: Path) -> WeightMap:
    config = read_hf_config(folder)
    family = FAMILIES[config["model_type"]]()
    return family.weights(family.arch(config))


def loaded(folder: Path, table: WeightMap, dtype: torch.dtype = torch.float32) -> Tensors:
    into = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in table.neutral_shapes().items()}
    load_checkpoint(folder, table, into)
    return into


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_export_loads_in_transformers_bit_for_bit(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "in")
    table = table_of(tmp_path / "in")
    neutral = loaded(tmp_path / "in", table)
    write_checkpoint(tmp_path / "out", table.export(neutral), read_hf_config(tmp_path / "in"))
    again, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert same(load_file(tmp_path / "in" / "model.safetensors"), written)
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        # Equal weights at other addresses: torch's sums may take another order by the alignment.
        torch.testing.assert_close(model(tokens).logits, again.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_experts_of_a_layer_in_one_tensor_are_taken_too(model: Any, tmp_path: Path) -> None:
    """As transformers 5 keeps them in memory."""
    model.save_pretrained(tmp_path)
    table = table_of(tmp_path)
    apart, together = loaded(tmp_path, table), loaded(tmp_path, table)
    for tensor in together.values():
        tensor.fill_(torch.nan)
    table.load(model.state_dict().items(), together)
    assert same(apart, together)
    named = dict(by_checkpoint_name(model.state_dict().items()))
    fused = [name for name in model.state_dict() if name not in named]
    if fused:
        first = next(name for name in named if name.startswith(fused[0].rpartition(".")[0] + ".0."))
        pair = [*model.state_dict().items(), (first, named[first])]
        with pytest.raises(CheckpointError, match="given twice"):
            table.load(pair, together)


def test_bfloat16_keeps_the_selection_bias_in_float32(tmp_path: Path) -> None:
    model = tiny_hf_model("deepseek_v3")
    model.save_pretrained(tmp_path / "in")
    table = table_of(tmp_path / "in")
    kinds = {rule.neutral: torch.float32 if rule.float32 else torch.bfloat16 for rule in table.rules}
    into = {name: torch.zeros(shape, dtype=kinds[name]) for name, shape in table.neutral_shapes().items()}
    load_checkpoint(tmp_path / "in", table, into)
    write_checkpoint(tmp_path / "out", table.export(into), read_hf_config(tmp_path / "in"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    gate = again.model.layers[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)


def with_mtp(folder: Path, table: WeightMap, dtype: torch.dtype = torch.float32) -> Tensors:
    """Add what the model predicts further tokens with to a folder's single shard; returns it."""
    torch.manual_seed(7)
    kept = {name: torch.randn(shape).to(dtype) for name, shape in table.kept.items()}
    path = folder / "model.safetensors"
    save_file({**load_file(path), **kept}, path, metadata={"format": "pt"})
    return kept


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_layers_for_multi_token_prediction_pass_through_untouched(family: str, tmp_path: Path) -> None:
    model = tiny_hf_model(family)
    model.save_pretrained(tmp_path / "in")
    table = table_of(tmp_path / "in")
    assert list(read_kept(tmp_path / "in", table)) == []
    kept = with_mtp(tmp_path / "in", table)
    assert len(kept) > 20
    neutral = loaded(tmp_path / "in", table)
    neutral["embed.weight"] += 1
    exported = with_kept(table.export(neutral), read_kept(tmp_path / "in", table), table, neutral)
    write_checkpoint(tmp_path / "out", exported, read_hf_config(tmp_path / "in"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == load_file(tmp_path / "in" / "model.safetensors").keys()
    for name, tensor in kept.items():
        # Copies of embedding and head follow the trained ones: an engine may take either.
        source = table.kept_copies.get(name)
        assert torch.equal(written[name], tensor if source is None else written[source]), name
    assert len(table.kept_copies) == (2 if family == "deepseek_v3" else 0)
    # transformers passes over them only where it knows their names.
    if family == "qwen3_next":
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_misshaped_kept_tensor_is_told(family: str, tmp_path: Path) -> None:
    tiny_hf_model(family).save_pretrained(tmp_path)
    table = table_of(tmp_path)
    name = next(iter(table.kept))
    shapes = [*read_shapes(tmp_path), (name, (1, 2, 3))]
    with pytest.raises(CheckpointError, match=r"of another shape: .* \[1, 2, 3\] instead of"):
        table.check(shapes)


def test_everything_wrong_with_a_mixture_is_told_at_once(tmp_path: Path) -> None:
    tiny_hf_model("deepseek_v3").save_pretrained(tmp_path)
    table = table_of(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.1.mlp.experts.7.up_proj.weight"]
    held["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.ones(20, 36)
    held["model.layers.2.mlp.experts.0.down_proj.weight"] = torch.ones(20, 36)
    held["model.layers.2.mlp.gate.e_score_correction_bias"][3] = torch.nan
    held["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][0, 0] = torch.inf
    into = {name: torch.zeros(shape) for name, shape in table.neutral_shapes().items()}
    with pytest.raises(CheckpointError) as caught:
        table.load(held.items(), into)
    for piece in (
        "missing: model.layers.1.mlp.experts.7.up_proj.weight",
        "unknown to the model: model.layers.1.mlp.experts.8.up_proj.weight",
        "of another shape: model.layers.2.mlp.experts.0.down_proj.weight [20, 36] instead of [36, 20]",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    ):
        assert piece in caught.value.why
    assert "holding NaN or infinity" in caught.value.why and "5 names" in caught.value.what
