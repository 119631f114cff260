"""The training decoder gives the rollout's log-probs and experts for the rollout's own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_core.backend import Backend, reference_backend
from grpo_core.model.transformer import Decoder
from grpo_core.types import Prompt, RoutedExperts

# Log-probs differ because sums are taken in another order: absorbed keys, the delta rule by steps instead of
# in chunks. Measured over three seeds of each family: at most 1.3e-5 for attention and experts, 3.6e-5 for
# gated delta, with logits of size about 10, whose float32 neighbours are 1e-6 apart.
FP32 = 1e-4
# In bfloat16 both sides round at the same places; where one sum rounds the other way, a logit of size 10
# moves by up to 2^-4. Measured: means up to 3.2e-4, the largest single difference 5.3e-2 (MLA).
BF16_MEAN, BF16_MAX = 2e-3, 0.125
# Offers for MLA round the absorbed query to bfloat16, training rounds the expanded keys: measured means up to
# 1.3e-2, the largest single difference 8.2e-2 (without replay 0.64, where experts differ).
PLANNED_MLA = 4e-2, 0.25
DENSE = ["llama", "llama-tied", "qwen2-bias", "qwen3-qk-norm"]
MIXED = [
    "qwen3_moe", "qwen3_moe-dense-first", "deepseek_v3", "deepseek_v3-q-lora", "qwen3_next",
    "qwen3_next-recurrent",
]  # fmt: skip
LENGTHS = [5, 21, 2, 40]


def trained(
    model: Any, dtype: torch.dtype, router_dtype: torch.dtype = torch.float32, backend: Backend | None = None
) -> Decoder:
    """The training decoder with the model's weights."""
    decoder = Decoder(
        model.arch, backend or reference_backend(), device="cpu", dtype=dtype, router_dtype=router_dtype
    )
    into = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    model.weight_map.load(model.tensors(), into)
    return decoder.requires_grad_(False)


def replayed(
    decoder: Decoder, prompt: Prompt, token_ids: tuple[int, ...], fixed_TMk: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of token_ids, experts of all tokens int16 [T, M, k]) by the training decoder."""
    tokens_T = torch.tensor(prompt.token_ids + token_ids)
    T, sizes = len(tokens_T), [getattr(layer.ffn, "top_k", 0) for layer in decoder.arch.layers]
    record_TMk = torch.full((T, sum(s > 0 for s in sizes), max(sizes)), -1, dtype=torch.int16)
    hidden_TC = decoder(
        tokens_T, torch.arange(T), cu_seqlens=torch.tensor([0, T], dtype=torch.int32), parents=None,
        max_seqlen=T, recompute=False, routed_experts_TMk=fixed_TMk,
        record_TMk=record_TMk if max(sizes) else None,
    )  # fmt: skip
    logits_LV = (hidden_TC @ decoder.head_weight().T)[len(prompt.token_ids) - 1 : -1].float()
    at_L1 = torch.tensor(token_ids)[:, None]
    return logits_LV.log_softmax(-1).gather(1, at_L1)[:, 0], record_TMk


def joined(routed: RoutedExperts) -> torch.Tensor:
    """The experts of a prompt and its completion, int16 [T, M, k]."""
    assert routed.prompt_PMk.dtype == routed.completion_NMk.dtype == torch.int16
    return torch.cat([routed.prompt_PMk, routed.completion_NMk])


@pytest.mark.parametrize("family", DENSE + MIXED)
def test_trainer_gives_the_rollouts_logprobs_in_float32(
    family: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    decoder = trained(model, torch.float32)
    prompts = toolbox.prompts_of(LENGTHS, 3)
    made = engine(model, max_sequences=5, options={"prefill_tokens": 16})
    for (place, _), completion in toolbox.run(made, prompts, max_tokens=12).items():
        logprobs, _ = replayed(decoder, prompts[place], completion.token_ids)
        assert (logprobs - torch.tensor(completion.logprobs)).abs().max() <= FP32
        assert completion.routed_experts is None


@pytest.mark.parametrize("family", DENSE + MIXED)
def test_trainer_gives_the_rollouts_logprobs_in_bfloat16_with_its_experts(
    family: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    decoder = trained(model, torch.bfloat16)
    prompts = toolbox.prompts_of(LENGTHS, 3)
    made = engine(model, max_sequences=5, dtype=torch.bfloat16, record_experts=True)
    gaps = []
    for (place, _), completion in toolbox.run(made, prompts, max_tokens=12).items():
        routed = completion.routed_experts
        assert (routed is None) == (family in DENSE)
        fixed_TMk = None if routed is None else joined(routed)
        logprobs, record_TMk = replayed(decoder, prompts[place], completion.token_ids, fixed_TMk)
        if fixed_TMk is not None:
            assert torch.equal(record_TMk[:-1], fixed_TMk[:-1])
        gaps.append((logprobs - torch.tensor(completion.logprobs)).abs())
    assert torch.cat(gaps).mean() <= BF16_MEAN
    assert torch.cat(gaps).max() <= BF16_MAX


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-qk-norm", *MIXED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_offers_agree_between_trainer_and_rollout(
    family: str, dtype: str, kernel_tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = kernel_tiny(family)
    backend, chosen = toolbox.planned(model.arch, dtype)
    compute = getattr(torch, dtype)
    decoder = trained(model, compute, backend=backend)
    prompts = toolbox.prompts_of(LENGTHS, 3)
    made = engine(model, backend=backend, dtype=compute, max_sequences=5, record_experts=True)
    gaps = []
    for (place, _), completion in toolbox.run(made, prompts, max_tokens=12).items():
        routed = completion.routed_experts
        fixed_TMk = None if routed is None else joined(routed)
        if fixed_TMk is not None and dtype == "float32":
            free_TMk = replayed(decoder, prompts[place], completion.token_ids)[1]
            assert torch.equal(free_TMk[:-1].sort(-1).values, fixed_TMk[:-1].sort(-1).values)
        logprobs, _ = replayed(decoder, prompts[place], completion.token_ids, fixed_TMk)
        gaps.append((logprobs - torch.tensor(completion.logprobs)).abs())
    mean, worst = PLANNED_MLA if "deepseek" in family else (BF16_MEAN, BF16_MAX)
    if dtype == "float32":
        mean = worst = FP32
    assert torch.cat(gaps).mean() <= mean, chosen
    assert torch.cat(gaps).max() <= worst, chosen


# Every way in which a token reaches the engine: whole and chunked prompts, more samples than lanes, a cache
# that takes groups apart, samples alone and in groups.
WAYS: dict[str, dict[str, Any]] = {
    "at-once": {"max_sequences": 16},
    "chunked": {"options": {"prefill_tokens": 7}},
    "few-lanes": {"max_sequences": 2},
    "little-room": {"options": {"cache_tokens": 64}},
}


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("way", WAYS)
def test_recorded_experts_are_the_trainers(
    family: str, way: str, tiny: Any, engine: Any, toolbox: Any
) -> None:
    model = tiny(family)
    decoder = trained(model, torch.float32)
    prompts = [*toolbox.prompts_of(LENGTHS, 3), *toolbox.prompts_of([*[1] * 4, 9], 1, seed=5)[4:]]
    made = engine(model, record_experts=True, **WAYS[way])
    found = toolbox.run(made, prompts, max_tokens=12)
    shape = (sum(hasattr(layer.ffn, "top_k") for layer in model.arch.layers), model.arch.layers[-1].ffn.top_k)
    assert len(found) == 13
    for (place, _), completion in found.items():
        routed = completion.routed_experts
        assert routed.prompt_PMk is found[place, 0].routed_experts.prompt_PMk
        assert tuple(routed.prompt_PMk.shape) == (len(prompts[place].token_ids), *shape)
        assert tuple(routed.completion_NMk.shape) == (len(completion.token_ids), *shape)
        _, record_TMk = replayed(decoder, prompts[place], completion.token_ids)
        assert torch.equal(joined(routed)[:-1], record_TMk[:-1])
        assert (routed.completion_NMk[-1] == -1).all()


def test_a_float64_router_routes_as_the_trainers(tiny: Any, engine: Any, toolbox: Any) -> None:
    model = tiny("qwen3_next")
    decoder = trained(model, torch.float32, torch.float64)
    prompts = toolbox.prompts_of([6, 13], 2)
    dtypes = set()
    backend = reference_backend()
    made = engine(model, record_experts=True, router_dtype="float64", backend=spying(backend, dtypes))
    for (place, _), completion in toolbox.run(made, prompts).items():
        logprobs, record_TMk = replayed(decoder, prompts[place], completion.token_ids)
        assert torch.equal(joined(completion.routed_experts)[:-1], record_TMk[:-1])
        assert (logprobs - torch.tensor(completion.logprobs)).abs().max() <= FP32
    assert dtypes == {torch.float64}


def spying(backend: Any, dtypes: set[torch.dtype]) -> Any:
    """The backend, noting the dtype of the logits that are routed."""
    import dataclasses

    def route(logits_TX: torch.Tensor, **settings: Any) -> Any:
        dtypes.add(logits_TX.dtype)
        return backend.moe.route(logits_TX, **settings)

    return dataclasses.replace(backend, moe=dataclasses.replace(backend.moe, layer=None, route=route))
