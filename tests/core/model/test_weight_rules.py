"""Where rows go: against the splits that transformers makes in its forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_hf_model

from grpo_core.model.weights import Part, Rule, WeightMap

Tensors = dict[str, torch.Tensor]


def neutral_of(model: Any) -> Tensors:
    family = FAMILIES[model.config.model_type]()
    table = family.weights(family.arch(model.config.to_dict()))
    into = {name: torch.zeros(shape) for name, shape in table.neutral_shapes().items()}
    table.load(model.state_dict().items(), into)
    return into


@pytest.mark.parametrize(("keys", "values"), [(2, 6), (3, 3), (1, 4)])
def test_gated_delta_rows_are_q_k_v_z_and_b_a_in_head_order(keys: int, values: int) -> None:
    model = tiny_hf_model("qwen3_next", linear_num_key_heads=keys, linear_num_value_heads=values)
    theirs, own = model.model.layers[0].linear_attn, neutral_of(model)
    x_1TC = torch.randn(1, 5, model.config.hidden_size)
    with torch.no_grad():
        q, k, v, z, b, a = theirs.fix_query_key_value_ordering(
            theirs.in_proj_qkvz(x_1TC), theirs.in_proj_ba(x_1TC)
        )
    wanted = torch.cat([part.flatten(2) for part in (q, k, v, z)], dim=-1)
    found = x_1TC @ own["layers.0.linear_attn.qkvz.weight"].T
    # Equal dot products, summed in another order by another shape of matrix.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    wanted = torch.cat([b, a], dim=-1)
    torch.testing.assert_close(x_1TC @ own["layers.0.linear_attn.ba.weight"].T, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(own["layers.0.linear_attn.conv.weight"], theirs.conv1d.weight[:, 0])


def test_gated_attention_rows_are_q_k_v_and_then_the_gates() -> None:
    model = tiny_hf_model("qwen3_next", attention_bias=True)
    theirs, own = model.model.layers[2].self_attn, neutral_of(model)
    heads, dim = model.config.num_attention_heads, model.config.head_dim
    for kind in ("weight", "bias"):
        q_gate = getattr(theirs.q_proj, kind).unflatten(0, (heads, 2, dim))
        wanted = [q_gate[:, 0].flatten(0, 1), getattr(theirs.k_proj, kind), getattr(theirs.v_proj, kind)]
        wanted.append(q_gate[:, 1].flatten(0, 1))
        assert torch.equal(own[f"layers.2.attn.qkv.{kind}"], torch.cat(wanted))


def test_experts_are_stacked_gate_over_up() -> None:
    for family, layer in (("qwen3_moe", 0), ("deepseek_v3", 1), ("qwen3_next", 0)):
        model = tiny_hf_model(family)
        experts, own = model.model.layers[layer].mlp.experts, neutral_of(model)
        assert torch.equal(own[f"layers.{layer}.mlp.experts.gate_up.weight"], experts.gate_up_proj)
        assert torch.equal(own[f"layers.{layer}.mlp.experts.down.weight"], experts.down_proj)


@st.composite
def part_cases(draw: st.DrawFn) -> tuple[Part, int]:
    """A part whose pieces lie in any order with gaps between them, and the rows of the neutral parameter."""
    groups = draw(st.integers(1, 4))
    rows = [groups * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 4)))]
    order = draw(st.permutations(range(len(rows))))
    starts, place = {}, draw(st.integers(0, 2))
    for index in order:
        starts[index] = place
        place += rows[index] + draw(st.integers(0, 2))
    pieces = tuple((starts[index], count) for index, count in enumerate(rows))
    return Part(name="part", pieces=pieces, groups=groups), place


@settings(max_examples=80, deadline=None)
@given(case=part_cases(), tail=st.sampled_from([(), (3,), (1, 2)]))
def test_any_move_of_rows_is_undone_by_the_export(case: tuple[Part, int], tail: tuple[int, ...]) -> None:
    part, total = case
    rule = Rule(neutral="own", shape=(total, *tail), tail=tail, parts=(part,))
    tensor = torch.randn(part.rows, *tail)
    own = torch.full((total, *tail), 9.0)
    rule.put(part, tensor, own)
    assert torch.equal(rule.take(part, own), tensor)
    # Row by row, from the words of the docstring.
    offset = 0
    for group in range(part.groups):
        for start, count in part.pieces:
            share = count // part.groups
            mine = own[start + group * share : start + (group + 1) * share]
            assert torch.equal(mine, tensor[offset : offset + share])
            offset += share
    untouched = torch.ones(total, dtype=torch.bool)
    for start, count in part.pieces:
        untouched[start : start + count] = False
    assert bool((own[untouched] == 9.0).all())


def test_a_part_may_come_as_a_view_with_strides() -> None:
    part = Part(name="part", pieces=((2, 2), (0, 2)), groups=2)
    rule = Rule(neutral="own", shape=(4, 3), tail=(3,), parts=(part,))
    tensor = torch.randn(3, 4).T
    own = torch.zeros(4, 3)
    rule.put(part, tensor, own)
    assert torch.equal(rule.take(part, own), tensor)


def test_only_moved_rows_are_copied_on_export() -> None:
    model = tiny_hf_model("qwen3_next")
    family = FAMILIES["qwen3_next"]()
    table = family.weights(family.arch(model.config.to_dict()))
    assert isinstance(table, WeightMap)
    own = neutral_of(model)
    storages = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    copied = {
        name.rpartition("layers.")[2][2:]
        for name, tensor in table.export(own)
        if tensor.untyped_storage().data_ptr() not in storages
    }
    assert copied == {
        "linear_attn.in_proj_qkvz.weight",
        "linear_attn.in_proj_ba.weight",
        "self_attn.q_proj.weight",
    }
