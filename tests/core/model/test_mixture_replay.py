"""Routing replay in the decoder: what is fixed, what is free, what is written down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mixture_layouts import packed, shared_groups, weighted
from tiny_models import decoder_of, tiny_hf_model

from grpo_core.model.arch import MoE

FAMILIES = ["qwen3_moe", "deepseek_v3", "qwen3_next"]


def model_of(family: str, backend: Any) -> Any:
    return decoder_of(tiny_hf_model(family, max_position_embeddings=320, rms_norm_eps=1e-2), backend)


def blank(decoder: Any, layout: dict[str, Any]) -> torch.Tensor:
    mixtures = [layer.ffn for layer in decoder.arch.layers if isinstance(layer.ffn, MoE)]
    return torch.full((len(layout["tokens_T"]), len(mixtures), mixtures[0].top_k), -1, dtype=torch.int16)


def free(decoder: Any, layout: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    record = blank(decoder, layout)
    with torch.no_grad():
        return decoder(**layout, recompute=False, record_TMk=record), record


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_of_the_models_own_choice_changes_nothing(family: str, backend: Any) -> None:
    decoder = model_of(family, backend)
    layout = packed(*shared_groups())
    hidden_TC, record = free(decoder, layout)
    assert (record >= 0).all()
    again = blank(decoder, layout)
    with torch.no_grad():
        replayed = decoder(**layout, recompute=False, routed_experts_TMk=record, record_TMk=again)
    assert torch.equal(replayed, hidden_TC)
    assert torch.equal(again, record)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_fixes_rows_and_leaves_those_of_minus_one_free(
    family: str, recompute: bool, backend: Any
) -> None:
    decoder = model_of(family, backend)
    layout = packed(*shared_groups())
    _, record = free(decoder, layout)
    experts = next(layer.ffn for layer in decoder.arch.layers if isinstance(layer.ffn, MoE)).num_experts
    fixed = (record + 1) % experts
    fixed[::2] = -1
    used = blank(decoder, layout)
    hidden_TC = decoder(**layout, recompute=recompute, routed_experts_TMk=fixed, record_TMk=used)
    assert torch.equal(used[1::2], fixed[1::2])
    # The first layer with experts sees the same inputs as without replay where no token was moved before.
    assert torch.equal(used[::2, 0], record[::2, 0])
    gradients = weighted(hidden_TC, torch.ones_like(hidden_TC), decoder)
    routers = {name: g for name, g in gradients.items() if name.endswith("router.weight")}
    assert routers and all(bool(g.abs().max() > 0) for g in routers.values()), "gradients reach the routers"
    assert torch.equal(fixed[1::2], used[1::2]) and bool((fixed[::2] == -1).all()), "the input is not written"


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_survives_a_router_that_falls_the_other_way_the_second_time(
    family: str, backend: Any
) -> None:
    decoder = model_of(family, backend)
    layout = packed(*shared_groups())
    wanted = weighted(decoder(**layout, recompute=False), torch.ones(1), decoder)
    calls = []

    def fickle(logits_TX: torch.Tensor, *, ids_Tk: torch.Tensor | None, **settings: Any) -> Any:
        calls.append(1)
        mixtures = sum(isinstance(layer.ffn, MoE) for layer in decoder.arch.layers)
        if len(calls) > mixtures and (ids_Tk is None or bool((ids_Tk < 0).any())):
            logits_TX = -logits_TX
        return backend.moe.route(logits_TX, ids_Tk=ids_Tk, **settings)

    unsteady = replace(backend, moe=replace(backend.moe, route=fickle, layer=None))
    for layer in decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.backend = unsteady
    found = weighted(decoder(**layout, recompute=True), torch.ones(1), decoder)
    assert len(calls) == 2 * sum(isinstance(layer.ffn, MoE) for layer in decoder.arch.layers)
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_a_layers_weights_come_from_the_current_logits_and_not_from_the_record(backend: Any) -> None:
    decoder = model_of("deepseek_v3", backend)
    layout = packed(*shared_groups())
    hidden_TC, record = free(decoder, layout)
    with torch.no_grad():
        for layer in decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.weight.mul_(0.5)
        replayed = decoder(**layout, recompute=False, routed_experts_TMk=record)
    assert not torch.allclose(replayed, hidden_TC, rtol=1e-3, atol=1e-3)


def test_router_logits_are_taken_in_float32_or_wider_whatever_the_model_computes_in(backend: Any) -> None:
    hf = tiny_hf_model("qwen3_moe")
    for router_dtype in (torch.float32, torch.float64):
        seen = []

        def watch(logits_TX: torch.Tensor, **settings: Any) -> Any:
            seen.append(logits_TX.dtype)  # noqa: B023
            return backend.moe.route(logits_TX, **settings)

        watching = replace(backend, moe=replace(backend.moe, route=watch, layer=None))
        decoder = decoder_of(hf, watching, torch.bfloat16, router_dtype=router_dtype)
        hidden_TC = decoder(**packed(*shared_groups()), recompute=False)
        assert set(seen) == {router_dtype}
        assert hidden_TC.dtype == torch.bfloat16
        assert torch.isfinite(hidden_TC).all()
