"""The native engine against transformers: greedy tokens, log-probs, batching, weights, sleep."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch

from grpo_core.backend import Backend, reference_backend
from grpo_core.errors import CheckpointError, ConfigError, DataError, GrpoError
from grpo_core.ops.reference.fused import PlainLinear
from grpo_core.types import Prompt, Sampling

FAMILIES = ["llama", "llama-tied", "qwen2-bias", "qwen3-qk-norm", "qwen2-window"]
# Both sides compute in float32 in another order of summation: logits of size about 10 differ by 1e-5 at most.
FP32 = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tiny: Any, engine: Any, toolbox: Any) -> None:
    model = tiny(family)
    prompts = toolbox.prompts_of([3, 11, 1, 7], 1)
    found = toolbox.run(engine(model), prompts, temperature=0.0, max_tokens=10)
    for prompt in prompts:
        expected = toolbox.greedy_of(model.hf, prompt.token_ids, 10)
        assert list(found[prompt.id, 0].token_ids) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("temperature", "filters"),
    [(1.0, {}), (0.7, {}), (1.3, {"top_k": 7}), (0.9, {"top_p": 0.6}), (1.1, {"min_p": 0.15}),
     (0.8, {"top_k": 20, "top_p": 0.8, "min_p": 0.02})],
)  # fmt: skip
def test_logprobs_equal_a_teacher_forced_transformers_pass(
    family: str, temperature: float, filters: dict[str, Any], tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    prompts = toolbox.prompts_of([5, 2, 9], 3)
    found = toolbox.run(engine(model), prompts, temperature=temperature, **filters)
    assert len(found) == 9
    for prompt in prompts:
        for index in range(3):
            completion = found[prompt.id, index]
            logits = toolbox.logits_after(model.hf, prompt.token_ids, completion.token_ids)
            at = torch.tensor(completion.token_ids)[:, None]
            expected1 = logits.log_softmax(-1).gather(1, at)[:, 0]
            expected = filtered(logits / temperature, **filters).log_softmax(-1).gather(1, at)[:, 0]
            assert torch.allclose(torch.tensor(completion.logprobs_t1).double(), expected1, atol=FP32)
            assert torch.allclose(torch.tensor(completion.logprobs).double(), expected, atol=FP32)


def filtered(scores: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """transformers' own filters in the order of its generate."""
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids = torch.zeros(scores.shape[0], 1, dtype=torch.long)
    warpers: list[Any] = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warp in warpers:
        scores = warp(ids, scores)
    return scores


def test_same_seed_draws_the_same_tokens_in_any_batch(tiny: Any, engine: Any, toolbox: Any) -> None:
    prompts = toolbox.prompts_of([4, 9, 2, 13, 6], 4)
    reference = toolbox.run(engine(tiny(), max_sequences=32), prompts, temperature=1.2, max_tokens=12)
    for settings in (
        {"max_sequences": 1}, {"max_sequences": 3}, {"options": {"prefill_tokens": 5}},
        {"options": {"cache_tokens": 40}},
    ):  # fmt: skip
        found = toolbox.run(engine(tiny(), **settings), prompts, temperature=1.2, max_tokens=12)
        assert {k: c.token_ids for k, c in found.items()} == {k: c.token_ids for k, c in reference.items()}
    alone = toolbox.run(engine(tiny()), [prompts[3]], temperature=1.2, max_tokens=12)
    assert alone[3, 2].token_ids == reference[3, 2].token_ids
    assert len({c.token_ids for c in reference.values()}) > 15


def test_other_seeds_draw_other_tokens(tiny: Any, engine: Any, toolbox: Any) -> None:
    made = engine(tiny())
    prompt = toolbox.prompts_of([5], 1)[0]
    drawn = {
        toolbox.run(made, [Prompt(id=0, token_ids=prompt.token_ids, seeds=(seed,))])[0, 0].token_ids
        for seed in range(6)
    }
    assert len(drawn) == 6


def test_a_groups_prompt_is_prefilled_once(tiny: Any, engine: Any, toolbox: Any) -> None:
    made = engine(tiny())
    toolbox.run(made, toolbox.prompts_of([10, 20], 4), min_tokens=8)
    counters = made.describe()["counters"]
    assert counters["prefill_tokens"] == 30
    assert counters["prefill_passes"] == 1
    assert counters["sampled_tokens"] == 2 * 4 * 8


def test_a_group_that_does_not_fit_is_split_without_a_second_prefill(
    tiny: Any, engine: Any, toolbox: Any
) -> None:
    # 10 prompt tokens and 8 for each completion: two completions fit into 30 tokens, six are wanted.
    made = engine(tiny(), options={"cache_tokens": 30})
    found = toolbox.run(made, toolbox.prompts_of([10], 6), min_tokens=8)
    counters = made.describe()["counters"]
    assert len(found) == 6
    assert counters["prefill_tokens"] == 10
    assert counters["decode_rows"] / counters["decode_steps"] == 2


def test_a_finished_sequence_frees_its_slot_at_once(tiny: Any, engine: Any, toolbox: Any) -> None:
    # Two lanes, four requests: one that stops early makes room for the next.
    model, lanes, new = tiny(), 2, 20
    prompts = toolbox.prompts_of([4, 6, 5, 3], 1)
    made = engine(model, max_sequences=lanes)
    free = toolbox.run(made, prompts, max_tokens=new, min_tokens=new)
    stop = free[0, 0].token_ids[2]
    made = engine(model, max_sequences=lanes)
    found = toolbox.run(made, prompts, max_tokens=new, stop_token_ids=(stop,))
    counters = made.describe()["counters"]
    assert found[0, 0].finish_reason == "stop" and len(found[0, 0].token_ids) == 3
    # One token of each comes from the prefill; no row was decoded for a sequence that had ended.
    assert counters["decode_rows"] == sum(len(c.token_ids) - 1 for c in found.values())
    assert counters["sampled_tokens"] == sum(len(c.token_ids) for c in found.values())


def test_completions_come_as_they_finish(tiny: Any, engine: Any, toolbox: Any) -> None:
    made = engine(tiny(), max_sequences=2, max_model_len=30)
    prompts = toolbox.prompts_of([27, 5], 1)
    order = [c.prompt_id for c in made.generate(prompts, Sampling(max_tokens=12, min_tokens=12))]
    assert order == [0, 1]
    first = next(iter(made.generate(prompts, Sampling(max_tokens=12, min_tokens=12))))
    assert (first.prompt_id, len(first.token_ids), first.finish_reason) == (0, 3, "length")


def test_min_tokens_holds_stop_ids_back_and_reports_the_unmasked_logprob(
    tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny()
    stops = tuple(range(20, 60))
    prompts = toolbox.prompts_of([6, 3], 4)
    found = toolbox.run(engine(model), prompts, max_tokens=9, min_tokens=5, stop_token_ids=stops)
    for (place, _), completion in found.items():
        early = torch.tensor(completion.token_ids[:5])
        assert not set(early.tolist()) & {*stops, toolbox.STOP}
        logits = toolbox.logits_after(model.hf, prompts[place].token_ids, completion.token_ids)
        at = torch.tensor(completion.token_ids)[:, None]
        free = logits.log_softmax(-1).gather(1, at)[:, 0]
        logits[:5, [*stops, toolbox.STOP]] = -torch.inf
        held = logits.log_softmax(-1).gather(1, at)[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs_t1).double(), free, atol=FP32)
        assert torch.allclose(torch.tensor(completion.logprobs).double(), held, atol=FP32)
    assert any(len(c.token_ids) == 6 and c.finish_reason == "stop" for c in found.values())


def test_stop_strings_end_a_completion_and_cut_its_text(tiny: Any, engine: Any, toolbox: Any) -> None:
    model = tiny()
    prompts = toolbox.prompts_of([6], 1)
    free = toolbox.run(engine(model), prompts, max_tokens=12, min_tokens=12)[0, 0]
    stop = free.text[4:7]
    found = toolbox.run(engine(model), prompts, max_tokens=12, min_tokens=2, stop=("never", stop))[0, 0]
    place = free.text.index(stop)
    assert found.text == free.text[:place]
    assert found.token_ids == free.token_ids[: place + 3]
    assert found.finish_reason == "stop"


def test_new_weights_take_effect_in_place(tiny: Any, engine: Any, toolbox: Any) -> None:
    old, new = tiny("qwen2-bias", 0), tiny("qwen2-bias", 1)
    prompts = toolbox.prompts_of([4, 7], 2)
    made = engine(old)
    before = toolbox.run(made, prompts)
    held = made.describe()["weight_bytes"]
    pointers = {name: tensor.data_ptr() for name, tensor in made._weights.plain.items()}
    made.load_weights(new.tensors(), 7)
    after = toolbox.run(made, prompts)
    assert {k: c.token_ids for k, c in after.items()} == {
        k: c.token_ids for k, c in toolbox.run(engine(new), prompts).items()
    }
    assert {c.token_ids for c in after.values()} != {c.token_ids for c in before.values()}
    assert {c.weight_version for c in before.values()} == {1}
    assert {c.weight_version for c in after.values()} == {7}
    assert made.describe()["weight_bytes"] == held
    assert {name: tensor.data_ptr() for name, tensor in made._weights.plain.items()} == pointers


def copying_backend(layer: type[PlainLinear]) -> Backend:
    backend = reference_backend()
    return dataclasses.replace(backend, linear=dataclasses.replace(backend.linear, packed=layer))


class Copying(PlainLinear):
    """A packed layer that works on a copy of its own, as oneDNN's."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        super().__init__(weight_NK.clone(), None if bias_N is None else bias_N.clone())

    def nbytes(self) -> int:
        return self.weight_NK.nbytes


def test_a_tied_head_follows_the_embedding(tiny: Any, engine: Any, toolbox: Any) -> None:
    # vLLM on CPU kept the old head after an update of a tied model (rollout log-probs off by 0.15).
    old, new = tiny("llama-tied", 0), tiny("llama-tied", 1)
    made = engine(old, backend=copying_backend(Copying))
    made.load_weights(new.tensors(), 2)
    completion = toolbox.run(made, toolbox.prompts_of([5], 1))[0, 0]
    prompt = toolbox.prompts_of([5], 1)[0].token_ids
    logits = toolbox.logits_after(new.hf, prompt, completion.token_ids).log_softmax(-1)
    expected = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs_t1).double(), expected, atol=FP32)


def test_a_load_never_holds_more_than_one_layers_buffer(tiny: Any, engine: Any, toolbox: Any) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Counting(Copying):
        def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
            super().__init__(weight_NK, bias_N)
            self.count(weight_NK)

        def update(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
            super().update(weight_NK, bias_N)
            self.count(weight_NK)

        def count(self, weight_NK: torch.Tensor) -> None:
            nonlocal most
            alive.append(weakref.ref(weight_NK))
            most = max(most, sum(ref() is not None for ref in alive))

    model = tiny("llama")
    made = engine(model, backend=copying_backend(Counting))
    made.load_weights(iter(tiny("llama", 1).tensors()), 2)
    assert len(alive) == 2 * (4 * len(model.arch.layers) + 1)
    assert most == 1
    assert made.describe()["weight_bytes"] == sum(tensor.nbytes for _, tensor in model.tensors())


def bad_weights(model: Any, kind: str) -> tuple[list[tuple[str, torch.Tensor]], str]:
    tensors = model.tensors()
    name, tensor = tensors[5]
    if kind == "missing":
        return tensors[:5] + tensors[6:], name
    if kind == "unknown":
        return [*tensors, ("model.layers.9.nothing", tensor)], "model.layers.9.nothing"
    if kind == "misshaped":
        return [*tensors[:5], (name, torch.zeros(3, 4)), *tensors[6:]], name
    broken = tensor.clone()
    broken.view(-1)[1] = torch.nan
    return [*tensors[:5], (name, broken), *tensors[6:]], name


@pytest.mark.parametrize("kind", ["missing", "unknown", "misshaped", "nan"])
def test_unfit_weights_are_refused_with_nothing_changed(
    kind: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    made = engine(tiny())
    prompts = toolbox.prompts_of([4, 7], 2)
    before = toolbox.run(made, prompts)
    tensors, name = bad_weights(tiny("llama-tied", 1), kind)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        made.load_weights(iter(tensors), 9)
    assert toolbox.run(made, prompts) == before


def test_sleep_frees_and_load_weights_wakes(tiny: Any, engine: Any, toolbox: Any) -> None:
    made = engine(tiny())
    prompts = toolbox.prompts_of([4, 7], 2)
    before = toolbox.run(made, prompts)
    made.sleep()
    facts = made.describe()
    assert facts["weight_bytes"] == 0 and facts["cache_bytes"] == 0
    made.wake()
    with pytest.raises(GrpoError, match="no weights"):
        list(made.generate(prompts, Sampling(max_tokens=2)))
    made.load_weights(tiny().tensors(), 1)
    assert toolbox.run(made, prompts) == before
    made.close()
    with pytest.raises(GrpoError, match="no weights"):
        list(made.generate(prompts, Sampling(max_tokens=2)))


def test_weights_come_from_the_checkpoint_until_others_are_loaded(
    tiny: Any, engine: Any, toolbox: Any, tmp_path: Any
) -> None:
    model = tiny()
    model.hf.save_pretrained(tmp_path)
    made = engine(model, load=False, model_path=str(tmp_path))
    prompts = toolbox.prompts_of([4, 7], 2)
    before = toolbox.run(made, prompts)
    assert {k: c.token_ids for k, c in before.items()} == {
        k: c.token_ids for k, c in toolbox.run(engine(model), prompts).items()
    }
    made.sleep()
    made.wake()
    assert made.describe()["weight_bytes"] > 0
    assert toolbox.run(made, prompts) == before


def test_a_prompt_too_long_is_refused_before_anything_runs(tiny: Any, engine: Any, toolbox: Any) -> None:
    made = engine(tiny(), max_model_len=20)
    for lengths in ([3, 20], [3, 50], [0]):
        with pytest.raises(DataError, match=f"prompt {len(lengths) - 1}"):
            made.generate(toolbox.prompts_of(lengths, 1), Sampling(max_tokens=2))
    with pytest.raises(DataError, match="outside of 0"):
        made.generate([Prompt(id=3, token_ids=(1, 99), seeds=(1,))], Sampling(max_tokens=2))
    assert made.describe()["counters"]["prefill_tokens"] == 0
    assert len(toolbox.run(made, toolbox.prompts_of([19], 1))[0, 0].token_ids) == 1


def test_only_one_call_at_a_time_and_an_abandoned_one_leaves_nothing(
    tiny: Any, engine: Any, toolbox: Any
) -> None:
    made = engine(tiny(), max_sequences=2)
    prompts = toolbox.prompts_of([4, 7, 5], 2)
    before = toolbox.run(made, prompts)
    running = made.generate(prompts, Sampling(max_tokens=8))
    next(running)
    for call in (
        lambda: list(made.generate(prompts, Sampling(max_tokens=8))),
        lambda: made.load_weights(tiny().tensors(), 3),
        made.sleep,
    ):
        with pytest.raises(GrpoError, match="while completions are being generated"):
            call()
    running.close()
    assert made._cache.table.alive == 0
    assert toolbox.run(made, prompts) == before


def test_unusable_settings_are_named(tiny: Any, engine: Any, toolbox: Any) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.options\.cache_token "):
        engine(tiny(), options={"cache_token": 3})
    made = engine(tiny(), options={"cache_tokens": 9})
    with pytest.raises(ConfigError, match="cannot hold one sequence of 12 tokens"):
        toolbox.run(made, toolbox.prompts_of([4], 2))
    with pytest.raises(ConfigError, match="empty stop string"):
        made.generate([], Sampling(max_tokens=1, stop=("",)))
    with pytest.raises(ConfigError, match=r"stop_token_ids \[61\]"):
        toolbox.run(engine(tiny()), toolbox.prompts_of([4], 1), stop_token_ids=(61,))
    assert toolbox.run(made, []) == {}
