"""A fresh model has the weights that transformers would start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, decoder_of, tiny_hf_model

from grpo_core.model.transformer import Decoder

STD = 0.02


def fresh(family: str, backend: Any, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    config = tiny_hf_model(family, initializer_range=STD).config.to_dict()
    decoder = Decoder(FAMILIES[family]().arch(config), backend, device="cpu", dtype=dtype)
    decoder.init_weights(seed)
    return decoder


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_fresh_mixtures_are_finite_and_depend_on_the_seed_alone(family: str, backend: Any) -> None:
    first, second, other = (fresh(family, backend, seed) for seed in (3, 3, 4))
    half = fresh(family, backend, 3, torch.bfloat16)
    pairs = zip(first.named_parameters(), second.parameters(), half.parameters(), strict=True)
    for (name, one), two, rounded in pairs:
        assert torch.isfinite(one).all(), name
        assert torch.equal(one, two), name
        assert torch.equal(one.bfloat16(), rounded), name
    router = next(name for name, _ in first.named_parameters() if name.endswith("router.weight"))
    assert not torch.equal(first.get_parameter(router), other.get_parameter(router))


def test_each_kind_of_parameter_starts_as_in_transformers(backend: Any) -> None:
    decoder = fresh("qwen3_next", backend, 0)
    parameters = dict(decoder.named_parameters())
    zeros = (
        "layers.0.attn_norm",
        "layers.0.mlp_norm",
        "layers.2.attn.q_norm",
        "layers.2.attn.k_norm",
        "norm",
    )
    for name in zeros:
        assert not parameters[f"{name}.weight"].any(), name
    assert bool((parameters["layers.0.linear_attn.norm.weight"] == 1).all())
    assert bool((parameters["layers.0.linear_attn.dt_bias"] == 1).all())
    rate = torch.cat([parameters[f"layers.{i}.linear_attn.A_log"].exp() for i in (0, 1)])
    assert bool((rate >= 0.0099).all()) and bool((rate <= 16.001).all()) and float(rate.std()) > 1
    for name in ("mlp.router", "mlp.experts.gate_up", "mlp.experts.down", "linear_attn.qkvz"):
        assert float(parameters[f"layers.0.{name}.weight"].std()) == pytest.approx(STD, rel=0.15), name
    latent = fresh("deepseek_v3", backend, 0)
    assert bool((latent.get_parameter("layers.0.attn.kv_a_norm.weight") == 1).all())
    assert bool((latent.get_parameter("norm.weight") == 1).all())
    assert not latent.get_buffer("layers.1.mlp.router.bias").any()


def test_selection_bias_stays_float32_and_out_of_the_parameters(backend: Any) -> None:
    decoder = decoder_of(tiny_hf_model("deepseek_v3"), backend, torch.bfloat16)
    name = "layers.1.mlp.router.bias"
    assert name not in dict(decoder.named_parameters())
    assert name in decoder.state_dict()
    assert decoder.get_buffer(name).dtype == torch.float32
    assert decoder.get_buffer(name).abs().max() > 0.1
