"""Consistent mode: the trainer gives the rollout's log-probs bit for bit, whatever runs beside a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from grpo_core.algo.packing import pack
from grpo_core.backend import Backend
from grpo_core.model.transformer import Decoder
from grpo_core.types import Batch, Completion, Sample, Scored

FAMILIES = [
    "llama", "llama-tied", "qwen2-bias", "qwen2-window", "qwen3-qk-norm", "qwen3_moe",
    "qwen3_moe-dense-first", "deepseek_v3", "deepseek_v3-q-lora", "qwen3_next", "qwen3_next-recurrent",
]  # fmt: skip
# One prompt is longer than a block of keys; completions end at different lengths.
LENGTHS = [5, 21, 2, 70]
NEW, MODEL_LEN, TEMPERATURE = 16, 96, 0.7
# Ways in which the same requests reach the engine ...
ENGINES: list[dict[str, Any]] = [
    {"max_sequences": 16},
    {"max_sequences": 3, "options": {"prefill_tokens": 7}},
    {"max_sequences": 5, "options": {"cache_tokens": 200, "prefill_tokens": 33}},
]
# ... and their tokens the trainer: (micro_tokens, share_prompt, recompute).
TRAININGS = [(10_000, True, False), (120, True, True), (64, False, False)]
Found = dict[tuple[int, int], Completion]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained(model: Any, backend: Backend, dtype: torch.dtype, router_dtype: torch.dtype) -> Decoder:
    decoder = Decoder(
        model.arch, backend, device="cpu", dtype=dtype, router_dtype=router_dtype, consistent=True
    )
    into = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    model.weight_map.load(model.tensors(), into)
    return decoder


def scored(prompts: Sequence[Any], found: Found) -> list[Scored]:
    return [
        Scored(
            sample=Sample(id=str(place)), prompt_token_ids=prompts[place].token_ids, completion=completion,
            rewards={}, reward=0.0,
        )
        for (place, _), completion in sorted(found.items())
    ]  # fmt: skip


def trainer_logprobs(decoder: Decoder, batch: Batch, temperature: float, *, recompute: bool) -> torch.Tensor:
    alone = not bool((batch.parents_S >= 0).any())
    hidden_TC = decoder(
        batch.tokens_T, batch.positions_T, cu_seqlens=batch.cu_seqlens,
        parents=None if alone else batch.parents_S, max_seqlen=batch.max_seqlen, recompute=recompute,
    )  # fmt: skip
    logprobs_L: torch.Tensor = decoder.backend.loss.logprob(
        hidden_TC.index_select(0, batch.predict_L), decoder.head_weight(), batch.labels_L,
        temperature=temperature, group=None,
    )[0]  # fmt: skip
    return logprobs_L


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainer_and_rollout_give_the_same_bits(
    family: str, dtype: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    check(family, dtype, tiny, engine, toolbox)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["qwen3-qk-norm", "deepseek_v3-q-lora", "qwen3_next"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_threads(family: str, dtype: str, tiny: Any, engine: Any, toolbox: Any) -> None:
    check(family, dtype, tiny, engine, toolbox)


def check(family: str, dtype: str, tiny: Any, engine: Any, toolbox: Any) -> None:
    model = tiny(family)
    router = "float64" if family.startswith("qwen3_next") else "float32"
    backend, chosen = toolbox.planned(model.arch, dtype, consistent=True, router_dtype=router)
    compute = getattr(torch, dtype)
    prompts = toolbox.prompts_of(LENGTHS, 3)
    # Nine of 61 tokens end a completion, so that lengths differ.
    sampling = {"max_tokens": NEW, "temperature": TEMPERATURE, "stop_token_ids": tuple(range(3, 57, 6))}
    runs: list[Found] = []
    for way in ENGINES:
        made = engine(
            model, backend=backend, dtype=compute, max_model_len=MODEL_LEN, router_dtype=router,
            consistent=True, **way,
        )  # fmt: skip
        runs.append(toolbox.run(made, prompts, **sampling))
    alone: Found = {}
    for prompt in prompts[:2]:
        alone |= toolbox.run(made, [prompt], **sampling)
    assert len({len(c.token_ids) for c in runs[0].values()}) > 1, "all completions are of one length"
    for other in (*runs[1:], alone):
        for key, completion in other.items():
            assert completion.token_ids == runs[0][key].token_ids
            assert completion.logprobs == runs[0][key].logprobs
            assert completion.logprobs_t1 == runs[0][key].logprobs_t1
    decoder = trained(model, backend, compute, getattr(torch, router))
    for micro_tokens, share, recompute in TRAININGS:
        batches = pack(scored(prompts, runs[0]), micro_tokens=micro_tokens, share_prompt=share, device="cpu")
        for batch in batches:
            logprobs_L = trainer_logprobs(decoder, batch, TEMPERATURE, recompute=recompute)
            assert torch.equal(logprobs_L, batch.rollout_logprobs_L), chosen
