"""Whole models at their real size, without their weights: every name, every count, in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import by_checkpoint_name

from grpo_core.model.arch import MLA, Attention, GatedDelta, MoE
from grpo_core.model.layout import Layout, rank_bytes
from grpo_core.model.scale import active_parameters, items, mtp_parameters, total_parameters
from grpo_models.plugin import grpo_models

FOLDER = Path(__file__).parent / "published"
FAMILIES = {name: family for family in grpo_models() for name in family.architectures}
# Total, met by a token: worked out by hand from the published shapes.
COUNTS = {
    "Qwen2.5-7B": (7_615_616_512, 7_615_616_512),
    "Qwen2.5-32B": (32_763_876_352, 32_763_876_352),
    "Moonlight-16B-A3B-Instruct": (15_960_110_208, 2_914_776_192),
    "DeepSeek-V3-0324": (671_026_419_200, 37_552_297_472),
    "Qwen3-Next-80B-A3B-Instruct": (79_674_391_296, 3_874_929_408),
    "Qwen3-30B-A3B": (30_532_122_624, 3_353_032_704),
}
CACHE_BYTES = {
    "Qwen2.5-7B": 28 * 2 * 4 * 128 * 2,
    "Qwen2.5-32B": 64 * 2 * 8 * 128 * 2,
    "Moonlight-16B-A3B-Instruct": 27 * 576 * 2,
    "DeepSeek-V3-0324": 61 * 576 * 2,
    "Qwen3-Next-80B-A3B-Instruct": 12 * 2 * 2 * 256 * 2,
    "Qwen3-30B-A3B": 48 * 2 * 4 * 128 * 2,
}


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return config


def made(name: str) -> tuple[Any, Any]:
    """(arch, family)."""
    config = config_of(name)
    family = FAMILIES[config["architectures"][0]]
    return family.arch(config), family


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_of_the_published_shapes(name: str) -> None:
    arch, family = made(name)
    assert (total_parameters(arch), active_parameters(arch)) == COUNTS[name]
    assert family.weights(arch).numel() == COUNTS[name][0]


def test_parts_of_the_large_models() -> None:
    each = {item.name: item for item in items(made("DeepSeek-V3-0324")[0])}
    assert each["latent attention"].each == 187_107_328 and each["latent attention"].count == 61
    assert mtp_parameters(made("DeepSeek-V3-0324")[0]) == 11_610_068_224
    assert {item.name: item.each for item in items(made("Moonlight-16B-A3B-Instruct")[0])}[
        "latent attention"
    ] == 13_763_072
    following = {item.name: item for item in items(made("Qwen3-Next-80B-A3B-Instruct")[0])}
    assert (following["gated delta"].each, following["gated delta"].count) == (33_718_464, 36)
    assert (following["attention"].each, following["attention"].count) == (27_263_488, 12)
    mixture = ("router", "512 experts", "shared expert")
    assert sum(following[part].each for part in mixture) == 1_614_809_088
    assert mtp_parameters(made("Qwen3-Next-80B-A3B-Instruct")[0]) == 1_650_471_424


@pytest.mark.parametrize("name", COUNTS)
def test_bytes_of_one_rank_that_holds_everything(name: str) -> None:
    arch, _ = made(name)
    stage, held = rank_bytes(arch, Layout(), dtype="bfloat16")
    frozen = sum(layer.ffn.num_experts for layer in arch.layers
                 if isinstance(layer.ffn, MoE) and layer.ffn.selection_bias)  # fmt: skip
    trained = COUNTS[name][0] - frozen
    assert stage == 0
    assert held.weights == 2 * trained + 4 * frozen
    assert (held.gradients, held.optimizer) == (4 * trained, 10 * trained)
    assert held.kv_cache_token == CACHE_BYTES[name]


@pytest.mark.parametrize("name", COUNTS)
def test_names_and_shapes_are_those_of_transformers_at_full_size(name: str) -> None:
    import torch
    import transformers

    arch, family = made(name)
    config = config_of(name)
    hf_config = getattr(transformers, config["architectures"][0].replace("ForCausalLM", "Config"))(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(hf_config)
    theirs = {key: tuple(tensor.shape) for key, tensor in by_checkpoint_name(model.state_dict().items())}
    ours = family.weights(arch).hf_names()
    assert ours == theirs
    if name == "DeepSeek-V3-0324":
        assert sum(".experts." in key for key in ours) == 58 * 256 * 3


@pytest.mark.parametrize("name", ["DeepSeek-V3-0324", "Qwen3-Next-80B-A3B-Instruct"])
def test_the_decoder_on_the_meta_device_has_the_parameters_of_the_map(name: str, backend: Any) -> None:
    import torch

    from grpo_core.model.transformer import Decoder

    arch, family = made(name)
    decoder = Decoder(arch, backend, device=torch.device("meta"), dtype=torch.bfloat16)
    held = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    shapes = family.weights(arch).neutral_shapes()
    assert {key: tuple(tensor.shape) for key, tensor in held.items()} == shapes
    frozen = {rule.neutral for rule in family.weights(arch).rules if rule.float32}
    assert {key for key, tensor in held.items() if tensor.dtype == torch.float32} == frozen
    assert frozen == set(dict(decoder.named_buffers()))


def test_arch_and_map_of_deepseek_take_little_time_and_memory() -> None:
    code = (
        "import json, resource, sys, time\n"
        "import torch, grpo_core.model.weight_rules\n"
        "from grpo_models.deepseek_v3 import DeepseekV3\n"
        f"config = json.load(open({str(FOLDER / 'DeepSeek-V3-0324.json')!r}))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, start = peak(), time.process_time()\n"
        "family = DeepseekV3(); arch = family.arch(config); table = family.weights(arch)\n"
        "table.check([*table.hf_names().items(), *table.kept.items()])\n"
        "print(time.process_time() - start, peak() - before, len(table.hf_names()), len(table.kept))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, mebibytes, names, kept = map(float, done.stdout.split())
    # 45 thousand names of a hundred bytes each with their places; the weights would be 1.3 TB.
    assert seconds < 5 and mebibytes < 150
    assert names == 58 * (256 * 3 + 3 + 2) + 3 * 3 + 61 * 9 + 3
    assert kept == 256 * 3 + 3 + 2 + 9 + 6


def test_moonlight_is_deepseek_without_query_compression_groups_and_yarn() -> None:
    arch, family = made("Moonlight-16B-A3B-Instruct")
    mixer, ffn = arch.layers[1].mixer, arch.layers[1].ffn
    assert family.name == "deepseek_v3" and isinstance(mixer, MLA)
    assert mixer.q_lora_rank is None and mixer.scale == 192**-0.5 and mixer.norm_eps == 1e-6
    assert (ffn.num_groups, ffn.topk_groups, ffn.top_k, ffn.scale) == (1, 1, 6, 2.446)
    assert ffn.shared_intermediate_size == 2816 and ffn.selection_bias and ffn.score == "sigmoid"
    assert arch.mtp is None and not family.weights(arch).kept
    assert arch.rms_norm_eps == 1e-5 and mixer.rope.theta == 50000 and mixer.rope.interleaved


def test_deepseek_as_published() -> None:
    arch, _ = made("DeepSeek-V3-0324")
    mixer = arch.layers[60].mixer
    # Equation of yarn's mscale: 0.1 ln(40) + 1.
    assert mixer.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2, rel=1e-15)
    assert [isinstance(layer.ffn, MoE) for layer in arch.layers] == [False] * 3 + [True] * 58
    assert arch.mtp is not None and arch.mtp.num_layers == 1 and arch.mtp.layer == arch.layers[60]


def test_qwen3_next_as_published() -> None:
    arch, _ = made("Qwen3-Next-80B-A3B-Instruct")
    kinds = [type(layer.mixer) for layer in arch.layers]
    assert kinds == [GatedDelta, GatedDelta, GatedDelta, Attention] * 12
    attention = arch.layers[3].mixer
    assert attention.output_gate and attention.qk_norm and attention.rope.rotary_dim == 64
    assert arch.zero_centered_norm and arch.layers[0].ffn.shared_gate and arch.layers[0].ffn.norm_topk_prob


@pytest.mark.parametrize("name", COUNTS)
def test_transformers_5_keeps_the_same_model(name: str) -> None:
    """A config.json that transformers 5 has read and written again gives an equal `Arch`."""
    import transformers

    config = config_of(name)
    again = getattr(transformers, config["architectures"][0].replace("ForCausalLM", "Config"))(**config)
    saved = again.to_dict() | {"architectures": config["architectures"]}
    first, second = made(name)[0], FAMILIES[config["architectures"][0]].arch(saved)
    assert first.layers == second.layers or _without_equal_ropes(first) == _without_equal_ropes(second)
    for key in ("vocab_size", "hidden_size", "rms_norm_eps", "zero_centered_norm", "max_position_embeddings"):
        assert getattr(first, key) == getattr(second, key)


def _without_equal_ropes(arch: Any) -> list[Any]:
    """Layers as plain data, rotary settings by what they compute: frequencies, factor and width."""
    import dataclasses

    from grpo_core.model.rope import inverse_frequencies

    found = []
    for layer in arch.layers:
        plain = dataclasses.asdict(layer)
        if plain["mixer"].pop("rope", None) is not None:
            rope = layer.mixer.rope
            frequencies, factor = inverse_frequencies(rope)
            plain["rope"] = (frequencies.tolist(), factor, rope.rotary_dim, rope.interleaved)
        found.append(plain)
    return found
