"""The native engine on experts, latents and recurrent states, against transformers and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core.types import Prompt

FAMILIES = [
    "qwen3_moe", "qwen3_moe-dense-first", "deepseek_v3", "deepseek_v3-q-lora", "qwen3_next",
    "qwen3_next-recurrent",
]  # fmt: skip
RECURRENT = ["qwen3_next", "qwen3_next-recurrent"]
# Both sides compute in float32 in another order of summation (absorbed instead of expanded keys, the delta
# rule in chunks or by steps): logits of size about 10 differ by a few 1e-5.
FP32 = 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_generate(family: str, tiny: Any, engine: Any, toolbox: Any) -> None:
    model = tiny(family)
    prompts = toolbox.prompts_of([3, 11, 1, 7], 1)
    found = toolbox.run(engine(model), prompts, temperature=0.0, max_tokens=10)
    for prompt in prompts:
        assert list(found[prompt.id, 0].token_ids) == toolbox.greedy_of(model.hf, prompt.token_ids, 10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill_tokens", [2048, 6])
def test_logprobs_equal_a_teacher_forced_transformers_pass_whole_or_in_chunks(
    family: str, prefill_tokens: int, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    # Longer than a chunk of the delta rule.
    prompts = toolbox.prompts_of([5, 2, 19, 70], 3)
    made = engine(model, max_model_len=90, options={"prefill_tokens": prefill_tokens})
    found = toolbox.run(made, prompts, temperature=0.9)
    assert len(found) == 12
    for (place, _), completion in found.items():
        logits = toolbox.logits_after(model.hf, prompts[place].token_ids, completion.token_ids)
        expected = (logits / 0.9).log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs).double(), expected, atol=FP32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_folder_written_by_transformers_is_read_by_name(
    family: str, tiny: Any, engine: Any, toolbox: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    model.hf.save_pretrained(tmp_path)
    prompts = toolbox.prompts_of([6, 3], 2)
    read = toolbox.run(engine(model, load=False, model_path=str(tmp_path)), prompts)
    given = toolbox.run(engine(model), prompts)
    assert {k: (c.token_ids, c.logprobs) for k, c in read.items()} == {
        k: (c.token_ids, c.logprobs) for k, c in given.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_draws_the_same_tokens_in_any_batch(
    family: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    prompts = toolbox.prompts_of([4, 9, 2, 13, 6], 4)
    reference = toolbox.run(engine(model, max_sequences=32), prompts, temperature=1.2, max_tokens=12)
    for settings in (
        {"max_sequences": 1}, {"max_sequences": 3}, {"options": {"prefill_tokens": 5}},
        {"options": {"cache_tokens": 40}}, {"options": {"cache_gib": 1e-6}},
    ):  # fmt: skip
        found = toolbox.run(engine(model, **settings), prompts, temperature=1.2, max_tokens=12)
        assert {k: c.token_ids for k, c in found.items()} == {k: c.token_ids for k, c in reference.items()}
    assert len({c.token_ids for c in reference.values()}) > 15


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_of_a_prompt_equal_sequences_of_their_own(
    family: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    group = toolbox.prompts_of([17], 5)[0]
    alone = [Prompt(id=g, token_ids=group.token_ids, seeds=(seed,)) for g, seed in enumerate(group.seeds)]
    forked = toolbox.run(engine(model), [group], max_tokens=14)
    separate = toolbox.run(engine(model), alone, max_tokens=14)
    for g in range(5):
        assert forked[0, g].token_ids == separate[g, 0].token_ids
        assert torch.allclose(
            torch.tensor(forked[0, g].logprobs), torch.tensor(separate[g, 0].logprobs), atol=FP32
        )


@pytest.mark.parametrize("family", RECURRENT)
def test_nothing_of_an_earlier_sequence_is_left_in_a_state(
    family: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    first, second = toolbox.prompts_of([9, 4, 30], 2), toolbox.prompts_of([7, 12], 2, seed=3)
    # Chunks after the first read the state; slots and rows are used again and again.
    settings = {"options": {"prefill_tokens": 5}, "max_sequences": 2}
    used = engine(model, **settings)
    toolbox.run(used, first)
    again, fresh = toolbox.run(used, second), toolbox.run(engine(model, **settings), second)
    assert {k: c.logprobs for k, c in again.items()} == {k: c.logprobs for k, c in fresh.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_take_effect_in_place(family: str, tiny: Any, engine: Any, toolbox: Any) -> None:
    old, new = tiny(family, 0), tiny(family, 1)
    prompts = toolbox.prompts_of([4, 7], 2)
    made = engine(old)
    before = toolbox.run(made, prompts)
    pointers = {name: tensor.data_ptr() for name, tensor in made._weights.plain.items()}
    made.load_weights(new.tensors(), 2)
    after, fresh = toolbox.run(made, prompts), toolbox.run(engine(new), prompts)
    assert {k: c.logprobs for k, c in after.items()} == {k: c.logprobs for k, c in fresh.items()}
    assert {k: c.logprobs for k, c in after.items()} != {k: c.logprobs for k, c in before.items()}
    assert {name: tensor.data_ptr() for name, tensor in made._weights.plain.items()} == pointers


@pytest.mark.parametrize("family", FAMILIES)
def test_sleep_frees_weights_cache_and_states_and_a_load_wakes(
    family: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    prompts = toolbox.prompts_of([4, 7], 3)
    made = engine(model)
    before, held = toolbox.run(made, prompts), made.describe()
    state_rows = 8 + 4 + 1 if family in RECURRENT else 0
    assert held["state_rows"] == state_rows
    made.sleep()
    assert made.describe()["cache_bytes"] == made.describe()["weight_bytes"] == 0
    made.load_weights(model.tensors(), 1)
    after = toolbox.run(made, prompts)
    assert {k: c.logprobs for k, c in after.items()} == {k: c.logprobs for k, c in before.items()}
    assert made.describe()["cache_bytes"] == held["cache_bytes"]


@pytest.mark.parametrize("family", RECURRENT)
def test_cache_bytes_count_the_states(family: str, tiny: Any, engine: Any) -> None:
    made = engine(tiny(family))
    one = sum(
        (K := layer.mixer).num_value_heads * K.key_head_dim * K.value_head_dim * 4
        + (2 * K.num_key_heads * K.key_head_dim + K.num_value_heads * K.value_head_dim) * 3 * 4
        for layer in tiny(family).arch.layers
        if hasattr(layer.mixer, "conv_kernel")
    )
    described = made.describe()
    cached = described["cache_bytes"] - 13 * one
    assert cached == 0 if family == "qwen3_next-recurrent" else cached > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_their_biases_stay_in_float32_and_experts_plain(
    family: str, tiny: Any, engine: Any
) -> None:
    model = tiny(family)
    made = engine(model, dtype=torch.bfloat16)
    plain = made._weights.plain
    experts = [i for i, layer in enumerate(model.arch.layers) if hasattr(layer.ffn, "top_k")]
    assert experts
    given = dict(model.tensors())
    for index in experts:
        router = plain[f"layers.{index}.mlp.router.weight"]
        # The trainer computes with the same weight rounded to bfloat16.
        rounded = given[f"model.layers.{index}.mlp.gate.weight"].bfloat16().float()
        assert router.dtype == torch.float32 and torch.equal(router, rounded)
        assert plain[f"layers.{index}.mlp.experts.gate_up.weight"].dtype == torch.bfloat16
        if model.arch.layers[index].ffn.selection_bias:
            bias = plain[f"layers.{index}.mlp.router.bias"]
            assert bias.dtype == torch.float32
            assert torch.equal(bias, given[f"model.layers.{index}.mlp.gate.e_score_correction_bias"])


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_recorded_only_when_asked(family: str, tiny: Any, engine: Any, toolbox: Any) -> None:
    prompts = toolbox.prompts_of([4, 7], 2)
    with_records = toolbox.run(engine(tiny(family), record_experts=True), prompts)
    without = toolbox.run(engine(tiny(family)), prompts)
    assert all(c.routed_experts is None for c in without.values())
    for key, completion in with_records.items():
        # A record needs the last layer's experts of every prompt token: products of other shapes.
        assert completion.token_ids == without[key].token_ids
        assert torch.allclose(
            torch.tensor(completion.logprobs), torch.tensor(without[key].logprobs), atol=FP32
        )
    assert all(c.routed_experts is not None for c in with_records.values())
