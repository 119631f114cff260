"""The same decoders on the offers that the plan chooses for this machine's CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixture_layouts import packed, shared_groups, tokens, weighted
from tiny_models import FAMILIES, decoder_of, tiny_hf_model

from grpo_core.backend import Backend, bind
from grpo_core.devices.pick import pick_device
from grpo_core.needs import RunFacts, needs_of
from grpo_core.plugins import load
from grpo_core.resolve import resolve

# Sizes that fused kernels like, beside the odd ones of `tiny_models`, which they may refuse.
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "moe_intermediate_size": 32,
        "num_experts": 8, "num_experts_per_tok": 4,
    },
    "deepseek_v3": {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "moe_intermediate_size": 32,
    },
    "qwen3_next": {
        "hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "moe_intermediate_size": 32,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_experts": 8, "rms_norm_eps": 1e-2,
    },
}  # fmt: skip
ODD: dict[str, dict[str, Any]] = {"qwen3_moe": {}, "deepseek_v3": {}, "qwen3_next": {"rms_norm_eps": 1e-2}}
CASES = [(family, "wide") for family in WIDE] + [(family, "odd") for family in ODD]


def model_of(case: tuple[str, str]) -> Any:
    family, kind = case
    settings = (WIDE if kind == "wide" else ODD)[family]
    return tiny_hf_model(family, max_position_embeddings=320, initializer_range=0.15, **settings)


def planned(model: Any, dtype: str) -> Backend:
    catalogue = load(off=())
    _, info = pick_device("cpu", catalogue)
    arch = FAMILIES[model.config.model_type]().arch(model.config.to_dict())
    needs = needs_of(arch, RunFacts(train_dtype=dtype, rollout_dtype=dtype))
    return bind(resolve(needs, catalogue, info, pins={}, fallback="none"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_planned_mixture_logits_equal_transformers(case: tuple[str, str]) -> None:
    model = model_of(case)
    sequences = tokens([40, 1, 150, 3], seed=1)
    decoder = decoder_of(model, planned(model, "float32"))
    with torch.no_grad():
        theirs = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
        ours = decoder(**packed(sequences, [-1] * 4), recompute=False) @ decoder.head_weight().T
    # As for the references: float32 through three layers.
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_planned_mixture_gradients_equal_those_of_the_references(
    case: tuple[str, str], recompute: bool, backend: Any
) -> None:
    model = model_of(case)
    layout = packed(*shared_groups())
    found = []
    for used in (backend, planned(model, "float32")):
        decoder = decoder_of(model, used)
        hidden_TC = decoder(**layout, recompute=recompute)
        weights = torch.randn(hidden_TC.shape, generator=torch.Generator().manual_seed(2))
        found.append((hidden_TC.detach(), weighted(hidden_TC, weights, decoder)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-4)
    largest = max(float(gradient.norm()) for gradient in found[0][1].values())
    for name, gradient in found[0][1].items():
        error = float((found[1][1][name] - gradient).norm())
        assert error / max(float(gradient.norm()), 1e-3 * largest) < 1e-3, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES[:3], ids="-".join)
@pytest.mark.parametrize("kind", ["references", "planned"])
def test_main_grads_take_the_experts_gradients_and_the_rest_stays(
    kind: str, case: tuple[str, str], dtype: str, backend: Any
) -> None:
    model = model_of(case)
    used = backend if kind == "references" else planned(model, dtype)
    decoder = decoder_of(model, used, getattr(torch, dtype))
    layout = packed(*shared_groups())
    found: list[dict[str, torch.Tensor]] = []
    for lent in (False, True):
        mains = {
            f"{name}.weight": torch.ones(layer.weight.shape)
            for name, layer in decoder.named_modules()
            if lent and hasattr(layer, "main_grad") and "experts" in name
        }
        for name, main in mains.items():
            decoder.get_submodule(name.removesuffix(".weight")).main_grad = main
        hidden_TC = decoder(**layout, recompute=True)
        weights = torch.randn(hidden_TC.shape, generator=torch.Generator().manual_seed(2))
        gradients = weighted(hidden_TC, weights, decoder)
        assert all(not gradients[name].any() for name in mains)
        found.append({**gradients, **{name: main - 1 for name, main in mains.items()}})
        assert bool(mains) == lent
    # A main grad of 1 keeps less than the gradient's last digits; bfloat16 rounds what autograd is given.
    close = {"float32": {"rtol": 1e-4, "atol": 1e-5}, "bfloat16": {"rtol": 2**-7, "atol": 1e-4}}[dtype]
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(
            found[1][name] / scale, gradient.float() / scale, **close, check_dtype=False
        )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_planned_mixture_in_bfloat16_is_as_near_to_float32_as_the_references(
    case: tuple[str, str], backend: Any
) -> None:
    model = model_of(case)
    sequences = tokens([40, 1, 90], seed=1)
    layout = packed(sequences, [-1] * 3)
    mixtures = sum(hasattr(layer.mlp, "gate") for layer in model.model.layers)
    record = torch.empty(131, mixtures, model.config.num_experts_per_tok, dtype=torch.int16)
    errors = []
    with torch.no_grad():
        exact = decoder_of(model, backend)(**layout, recompute=False, record_TMk=record)
        for used in (backend, planned(model, "bfloat16")):
            decoder = decoder_of(model, used, torch.bfloat16)
            # With the experts fixed the difference is rounding alone.
            hidden = decoder(**layout, recompute=False, routed_experts_TMk=record)
            errors.append(float((hidden.float() - exact).norm() / exact.norm()))
    # Both round at the same places; kernels may keep some sums in another order.
    assert errors[0] < 0.05
    assert errors[1] < 1.3 * errors[0]


def test_training_after_a_rollout_of_the_same_lengths_can_go_backward() -> None:
    # A plan of chunks that the rollout made and kept could not be saved for backward.
    model = model_of(("qwen3_next", "odd"))
    decoder = decoder_of(model, planned(model, "float32"))
    # Lengths that no other test has, or its plan would be the one kept.
    layout = packed(tokens([11, 17, 23], seed=1), [-1, 0, 0])
    with torch.inference_mode():
        decoder(**layout, recompute=False)
    hidden_TC = decoder(**layout, recompute=False)
    gradients = weighted(hidden_TC, torch.ones_like(hidden_TC), decoder)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
