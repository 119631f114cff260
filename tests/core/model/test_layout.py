"""What one rank holds: shares add up to the model, and layouts that do not divide it are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_core.errors import ConfigError
from grpo_core.model.layout import Layout, rank_bytes, stage_layers
from grpo_core.model.scale import frozen_parameters, total_parameters
from grpo_models.plugin import grpo_models

FOLDER = Path(__file__).parents[2] / "plugins" / "models" / "published"
FAMILIES = {name: family for family in grpo_models() for name in family.architectures}


def arch_of(name: str, **changes: Any) -> Any:
    config = json.loads((FOLDER / f"{name}.json").read_text()) | changes
    return FAMILIES[config["architectures"][0]].arch(config)


@pytest.mark.parametrize(("layers", "stages"), [(61, 16), (48, 48), (27, 1), (5, 4)])
def test_stages_hold_every_layer_once(layers: int, stages: int) -> None:
    held = [index for stage in range(stages) for index in stage_layers(layers, stages, stage)]
    assert held == list(range(layers))
    sizes = {len(stage_layers(layers, stages, stage)) for stage in range(stages)}
    assert max(sizes) - min(sizes) <= 1


def test_experts_are_shared_out_and_the_rest_is_not() -> None:
    arch = arch_of("DeepSeek-V3-0324")
    experts = 58 * 256 * 3 * 2048 * 7168
    rest = total_parameters(arch) - experts - frozen_parameters(arch)
    _, held = rank_bytes(arch, Layout(data=64, expert=64), dtype="bfloat16")
    assert held.gradients == 4 * (rest + experts // 64)
    assert held.weights == 2 * (rest + experts // 64) + 4 * frozen_parameters(arch)
    assert held.optimizer == 10 * (rest + experts // 64)
    # 64 ranks hold the same dense weights, and no two the same experts.
    _, shared = rank_bytes(arch, Layout(data=64, expert=64, distributed_optimizer=True), dtype="bfloat16")
    assert shared.optimizer == 10 * (-(-rest // 64) + experts // 64)
    assert shared.weights == held.weights


def test_tensor_parallel_shares_of_moonlight_by_hand() -> None:
    arch = arch_of("Moonlight-16B-A3B-Instruct")
    hidden, tensor = 2048, 4
    _, held = rank_bytes(arch, Layout(tensor=tensor, expert=tensor), dtype="float32")
    latent = 576 * hidden + 512  # the down projection and its norm are whole on every rank
    heads = (3072 * hidden + 4096 * 512 + hidden * 2048) // tensor
    sparse = 64 * hidden + 3 * hidden * 2816 // tensor + 64 // tensor * 3 * hidden * 1408
    outer = 2 * 163840 // tensor * hidden + hidden
    trained = outer + 27 * (2 * hidden + latent + heads) + 3 * hidden * 11264 // tensor + 26 * sparse
    assert held.gradients == 4 * trained and held.optimizer == 8 * trained
    assert held.weights == 4 * trained + 4 * 26 * 64
    assert held.kv_cache_token == 27 * 576 * 4, "the latent is not divided"


def test_key_value_heads_are_repeated_beyond_their_number() -> None:
    arch = arch_of("Qwen2.5-7B", num_attention_heads=32, num_key_value_heads=4, hidden_size=4096)
    caches = [rank_bytes(arch, Layout(tensor=t), dtype="bfloat16")[1].kv_cache_token for t in (1, 2, 4, 8)]
    assert caches == [57344, 28672, 14336, 14336]


def test_recurrent_states_of_qwen3_next() -> None:
    arch = arch_of("Qwen3-Next-80B-A3B-Instruct")
    _, held = rank_bytes(arch, Layout(), dtype="bfloat16")
    assert held.state_sequence == 36 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
    _, half = rank_bytes(arch, Layout(tensor=2, expert=2), dtype="bfloat16")
    assert half.state_sequence == held.state_sequence // 2


def test_the_fullest_stage_is_told() -> None:
    # The last stage holds the head beside as many layers as the middle ones.
    arch = arch_of("Qwen2.5-7B")
    stage, held = rank_bytes(arch, Layout(pipeline=4), dtype="float32")
    layers, table = 7 * 233_057_792, 152064 * 3584
    assert stage == 3 and held.weights == 4 * (layers + table + 3584)
    tied = arch_of("Qwen2.5-7B", tie_word_embeddings=True)
    assert rank_bytes(tied, Layout(pipeline=4), dtype="float32")[1].weights == held.weights
    assert rank_bytes(tied, Layout(), dtype="float32")[1].weights == 4 * total_parameters(tied)


@pytest.mark.parametrize(
    ("name", "layout", "told"),
    [
        ("Qwen2.5-7B", {"tensor": 3}, "does not divide 28 attention heads"),
        ("Qwen2.5-7B", {"tensor": 7}, "does not divide 4 key-value heads"),
        ("Qwen2.5-7B", {"pipeline": 29}, "29 pipeline stages for 28 layers"),
        ("Qwen2.5-7B", {"data": 0}, "data parallel size 0 is below 1"),
        ("Moonlight-16B-A3B-Instruct", {"data": 3, "expert": 2}, "does not divide data x tensor 3"),
        ("Moonlight-16B-A3B-Instruct", {"data": 3, "expert": 3}, "does not divide 64 experts"),
        ("Qwen3-Next-80B-A3B-Instruct", {"tensor": 32}, "does not divide 16 key heads"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(name: str, layout: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_bytes(arch_of(name), Layout(**layout), dtype="bfloat16")
    assert told in caught.value.why
