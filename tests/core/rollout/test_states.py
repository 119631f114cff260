"""Recurrent states beside a token cache: rows, forks, sleep, and their part of the budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.errors import ConfigError
from grpo_core.model.arch import MLA, Arch, Attention, DenseMLP, GatedDelta, Layer, Rope
from grpo_core.rollout.caches import CachePlan, make_cache, plan_cache
from grpo_core.rollout.options import NativeOptions, cache_size, state_rows, token_bytes
from grpo_core.rollout.states import SlotCounter, StatefulCache, States, state_bytes

GIB = 2**30
ROPE = Rope(theta=1e4, rotary_dim=8)
DELTA = GatedDelta(num_key_heads=2, num_value_heads=4, key_head_dim=3, value_head_dim=5, conv_kernel=4)
WIDE = replace(DELTA, value_head_dim=7)
GQA = Attention(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope=ROPE)
LATENT = MLA(
    num_attention_heads=4, q_lora_rank=None, kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=5, rope=ROPE, scale=0.25,
)  # fmt: skip


def arch_of(*mixers: Any) -> Arch:
    return Arch(
        family="test", vocab_size=11, hidden_size=16, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=64,
        layers=tuple(Layer(mixer=mixer, ffn=DenseMLP(intermediate_size=8)) for mixer in mixers),
    )  # fmt: skip


def stateful(rows: int, max_slots: int) -> StatefulCache:
    states = States(
        arch_of(DELTA, GQA, WIDE, DELTA), rows=rows, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    return StatefulCache(SlotCounter(max_slots), states, max_slots=max_slots, device=torch.device("cpu"))


def test_shapes_and_bytes_are_those_of_the_layers() -> None:
    cache = stateful(3, 5)
    assert sorted(cache.states.layers) == [0, 2, 3]
    first, wide = cache.states.layers[0], cache.states.layers[2]
    assert first.delta_NKDE.shape == (3, 4, 3, 5) and first.delta_NKDE.dtype == torch.float32
    # 2 key heads of 3 twice, 4 value heads of 5: 32 channels; a filter of 4 sees 3 inputs before.
    assert first.window_NCW.shape == (3, 32, 3) and first.window_NCW.dtype == torch.bfloat16
    assert wide.delta_NKDE.shape == (3, 4, 3, 7)
    one = (60 + 84 + 60) * 4 + (32 + 40 + 32) * 3 * 2
    assert state_bytes(arch_of(DELTA, GQA, WIDE, DELTA), 2) == one
    assert cache.nbytes() == 3 * one


def test_release_drops_the_storage_and_restore_brings_zeros() -> None:
    cache = stateful(3, 5)
    held = cache.nbytes()
    slot = cache.allocate(1)
    cache.states.layers[0].delta_NKDE.fill_(2.0)
    cache.free(slot)
    cache.release()
    assert cache.nbytes() == 0
    cache.restore()
    assert cache.nbytes() == held
    assert float(cache.states.layers[0].delta_NKDE.abs().sum()) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "fork", "free", "reset"]), st.integers(0, 99)), max_size=40
    )
)
def test_every_slot_has_its_own_state_through_any_life(actions: list[tuple[str, int]]) -> None:
    rows = 4
    cache = stateful(rows, 7)
    layers = list(cache.states.layers.values())
    expected: dict[int, float] = {}
    for turn, (action, pick) in enumerate(actions, start=1):
        alive = sorted(expected)
        if action == "reset":
            cache.reset()
            expected.clear()
        elif action == "free" and alive:
            cache.free(alive[pick % len(alive)])
            del expected[alive[pick % len(alive)]]
        elif action == "fork" and alive:
            parent = alive[pick % len(alive)]
            child = cache.fork(parent, prefix=1, length=1)
            assert (child is None) == (len(expected) == rows)
            if child is not None:
                expected[child] = expected[parent]
        elif action == "allocate":
            slot = cache.allocate(1)
            assert (slot is None) == (len(expected) == rows)
            if slot is not None:
                assert all(
                    float(t[int(cache.row_of[slot])].float().abs().sum()) == 0 for s in layers for t in s
                )
                expected[slot] = float(turn)
                for state in layers:
                    for tensor in state:
                        tensor[int(cache.row_of[slot])] = float(turn)
        for slot, value in expected.items():
            for state in layers:
                for tensor in state:
                    assert (tensor[int(cache.row_of[slot])] == value).all()


def test_a_full_token_cache_takes_no_row() -> None:
    cache = stateful(9, 2)
    first = cache.allocate(1)
    assert first is not None and cache.fork(first, prefix=1, length=1) is not None
    assert cache.allocate(1) is None and cache.fork(first, prefix=1, length=1) is None
    assert len(cache._free) == 7


def test_bytes_of_a_token_count_only_layers_that_cache_tokens() -> None:
    assert token_bytes(arch_of(GQA, DELTA, GQA), 2) == 2 * (2 * 2 * 8 * 2)
    assert token_bytes(arch_of(LATENT, LATENT, LATENT), 4) == 3 * (6 + 8) * 4
    assert token_bytes(arch_of(DELTA), 4) == 0


@pytest.mark.parametrize("cache_gib", [1e-4, 1e-3, 0.01, 2.0])
@pytest.mark.parametrize("max_sequences", [1, 8, 300])
def test_tokens_and_states_share_the_budget(cache_gib: float, max_sequences: int) -> None:
    arch = arch_of(DELTA, DELTA, GQA, DELTA)
    options, longest = NativeOptions(cache_gib=cache_gib), 100
    sizes = {"max_sequences": max_sequences, "max_model_len": longest, "itemsize": 4}
    rows = state_rows(options, arch, **sizes)
    tokens = cache_size(options, arch, **sizes, rows=rows)
    slack = 512 * token_bytes(arch, 4)
    held = rows * state_bytes(arch, 4) + tokens * token_bytes(arch, 4) - slack
    smallest = 2 * state_bytes(arch, 4) + longest * token_bytes(arch, 4)
    assert held <= max(cache_gib * GIB, smallest)
    assert rows >= 2 and tokens >= longest
    # Where the budget binds, neither part takes what the other needs: rows and tokens of as many sequences.
    if rows < max_sequences:
        assert tokens * 3 // 2 + longest >= rows * longest * 0.9 or rows == 2


def test_a_budget_that_does_not_bind_serves_all_sequences_and_their_prompts() -> None:
    sizes = {"max_sequences": 8, "max_model_len": 100, "itemsize": 4}
    assert state_rows(NativeOptions(), arch_of(DELTA), **sizes) == 8 + 4 + 1
    assert state_rows(NativeOptions(), arch_of(GQA), **sizes) == 0
    assert cache_size(NativeOptions(), arch_of(DELTA), **sizes, rows=13) == 800 + 512


def plan_of(arch: Arch, **changes: Any) -> CachePlan:
    from types import SimpleNamespace

    setup: Any = SimpleNamespace(
        arch=arch,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_sequences=4,
        max_model_len=32,
        capture=None,
        **changes,
    )
    return plan_cache(setup, NativeOptions())


def test_the_token_cache_has_only_the_layers_that_need_one() -> None:
    mixed = plan_of(arch_of(DELTA, GQA, DELTA, GQA, DELTA))
    assert (mixed.tokens.num_layers, mixed.latent, mixed.rows) == (2, False, 7)
    latent = plan_of(arch_of(LATENT, LATENT))
    spec = latent.tokens
    assert (spec.num_layers, spec.num_key_value_heads, spec.head_dim, spec.v_head_dim) == (2, 1, 14, 6)
    assert latent.latent and latent.rows == 0


def test_a_model_without_attention_still_gets_slots() -> None:
    from types import SimpleNamespace

    arch = arch_of(DELTA, WIDE)
    setup: Any = SimpleNamespace(
        arch=arch, dtype=torch.float32, device=torch.device("cpu"), backend=None, capture=None
    )
    cache = make_cache(setup, plan_of(arch))
    slots = [cache.allocate(10**9) for _ in range(8)]
    assert len(set(slots[:7])) == 7 and None not in slots[:7]
    assert slots[7] is None


def test_layers_of_two_cache_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot serve"):
        plan_of(arch_of(GQA, LATENT))
    with pytest.raises(ConfigError, match="cannot serve"):
        plan_of(arch_of(GQA, replace(GQA, num_key_value_heads=4)))
