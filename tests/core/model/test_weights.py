"""The weight map: exact inverse, everything wrong told at once, tied heads held to their embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, decoder_of, tiny_hf_model

from grpo_core.errors import CheckpointError
from grpo_core.model.transformer import Decoder
from grpo_core.model.weights import WeightMap, is_finite

Tensors = dict[str, torch.Tensor]


def map_of(model: Any) -> WeightMap:
    family = FAMILIES[model.config.model_type]()
    return family.weights(family.arch(model.config.to_dict()))


def parts(family: str = "llama", **options: Any) -> tuple[WeightMap, Tensors, Tensors]:
    """A map, a checkpoint that fits it, and zeroed parameters to load into."""
    model = tiny_hf_model(family, **options)
    table = map_of(model)
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    return table, held, {name: torch.zeros(shape) for name, shape in table.neutral_shapes().items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    ],
)
def test_names_and_shapes_are_those_of_transformers(
    family: str, options: dict[str, Any], backend: Any
) -> None:
    model = tiny_hf_model(family, **options)
    assert map_of(model).hf_names() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    decoder = decoder_of(model, backend)
    assert map_of(model).neutral_shapes() == {name: tuple(p.shape) for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_export_gives_back_what_was_loaded(family: str) -> None:
    table, held, into = parts(family)
    table.load(reversed(held.items()), into)
    exported = dict(table.export(into))
    assert exported.keys() == held.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in held.items())


def test_fused_rows_are_q_then_k_then_v_and_gate_then_up() -> None:
    table, held, into = parts()
    table.load(held.items(), into)
    prefix = "model.layers.1.self_attn."
    qkv = torch.cat([held[f"{prefix}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(into["layers.1.attn.qkv.weight"], qkv)
    gate_up = torch.cat([held[f"model.layers.2.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(into["layers.2.mlp.gate_up.weight"], gate_up)


def test_export_is_views_without_gradient(backend: Any) -> None:
    model = tiny_hf_model("qwen2")
    decoder = decoder_of(model, backend)
    parameters = dict(decoder.named_parameters())
    exported = dict(map_of(model).export(parameters))
    qkv = parameters["layers.0.attn.qkv.weight"]
    view = exported["model.layers.0.self_attn.k_proj.weight"]
    assert view.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert not view.requires_grad and view.is_contiguous()


def test_load_casts_in_place_and_keeps_parameters_trainable(backend: Any) -> None:
    model = tiny_hf_model("llama")
    decoder = Decoder(decoder_of(model, backend).arch, backend, device="cpu", dtype=torch.bfloat16)
    parameters = dict(decoder.named_parameters())
    places = {name: p.data_ptr() for name, p in parameters.items()}
    map_of(model).load(model.state_dict().items(), parameters)
    assert torch.equal(parameters["norm.weight"], model.model.norm.weight.bfloat16())
    assert all(p.requires_grad and p.grad_fn is None for p in parameters.values())
    assert {name: p.data_ptr() for name, p in parameters.items()} == places


def test_all_troubles_are_told_at_once() -> None:
    table, held, into = parts()
    del held["model.norm.weight"]
    held["model.layers.9.extra.weight"] = torch.ones(2)
    held["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    held["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    held["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.inf
    held["lm_head.weight"] = torch.ones(53, 36, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        table.load(held.items(), into)
    told = caught.value.why
    for piece in (
        "missing: model.norm.weight",
        "unknown to the model: model.layers.9.extra.weight",
        "model.layers.0.mlp.up_proj.weight [3, 3] instead of [44, 36]",
        "holding NaN or infinity: model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj",
        "lm_head.weight torch.int8",
    ):
        assert piece in told
    assert "6 names" in caught.value.what


def test_check_changes_nothing_and_needs_no_data() -> None:
    table, held, _ = parts()
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    table.check(shapes.items())
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        table.check((name, shape) for name, shape in shapes.items() if name != "lm_head.weight")
    with pytest.raises(CheckpointError, match=r"given twice: model\.norm\.weight"):
        table.check([*shapes.items(), ("model.norm.weight", (36,))])


def test_many_missing_names_are_counted_not_listed() -> None:
    table, _, into = parts()
    with pytest.raises(CheckpointError) as caught:
        table.load([], into)
    assert f"and {len(table.hf_names()) - 6} more" in caught.value.why


def test_old_rotary_buffers_are_ignored() -> None:
    table, held, into = parts()
    table.load([*held.items(), ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(3))], into)


@pytest.mark.parametrize("order", ["head first", "head last"])
def test_tied_head_in_a_checkpoint_must_equal_the_embedding(order: str) -> None:
    table, held, into = parts(tie_word_embeddings=True)
    assert "lm_head.weight" not in table.hf_names()
    embedding = held["model.embed_tokens.weight"]

    def stream(head: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        pair = ("lm_head.weight", head)
        return [pair, *held.items()] if order == "head first" else [*held.items(), pair]

    table.load(stream(embedding.clone()), into)
    with pytest.raises(CheckpointError, match=r"unequal to model\.embed_tokens\.weight.*lm_head\.weight"):
        table.load(stream(embedding + 1), into)
    with pytest.raises(CheckpointError, match="of another shape"):
        table.load(stream(embedding[:-1]), into)


def test_tied_head_alone_does_not_stand_for_the_embedding() -> None:
    table, held, into = parts(tie_word_embeddings=True)
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        table.load(held.items(), into)


def test_two_maps_share_nothing() -> None:
    model = tiny_hf_model("llama")
    first, second = map_of(model), map_of(model)
    assert first == second and first is not second and first.rules is not second.rules
    with pytest.raises(AttributeError):
        first.rules = ()  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=0, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_finite_means_every_element_is(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_large_finite_values_whose_sum_overflows_are_finite() -> None:
    assert is_finite(torch.full((8,), 3e38))
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
