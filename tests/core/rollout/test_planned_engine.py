"""The engine on whatever offers the plan chooses for this machine's CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

FAMILIES = [
    "llama-tied", "qwen2-bias", "qwen3-qk-norm", "qwen2-window", "qwen3_moe", "qwen3_moe-dense-first",
    "deepseek_v3", "deepseek_v3-q-lora", "qwen3_next", "qwen3_next-recurrent",
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, kernel_tiny: Any) -> Any:
    return kernel_tiny(request.param)


def teacher_forced(model: Any, prompt: tuple[int, ...], completion: Any) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.tensor([prompt + completion.token_ids])
        logits = model.hf(tokens, use_cache=False).logits[0].double()
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def test_float32_offers_give_transformers_logprobs(model: Any, engine: Any, toolbox: Any) -> None:
    backend, _ = toolbox.planned(model.arch, "float32")
    prompts = toolbox.prompts_of([40, 3, 17], 3)
    made = engine(model, backend=backend, max_sequences=4, options={"prefill_tokens": 24})
    for (place, _), completion in toolbox.run(made, prompts).items():
        expected = teacher_forced(model, prompts[place].token_ids, completion)
        # Summation order is the only difference; logits are below 20.
        assert torch.allclose(torch.tensor(completion.logprobs).double(), expected, atol=2e-4)


def test_bfloat16_offers_stay_as_near_as_the_references(model: Any, engine: Any, toolbox: Any) -> None:
    # Both round to bfloat16 at the same places, so the planned offers may not be much worse.
    backend, chosen = toolbox.planned(model.arch, "bfloat16")
    prompts = toolbox.prompts_of([40, 3, 17, 33], 4)
    errors = {}
    for name, used in (("planned", backend), ("reference", None)):
        made = engine(
            model, backend=used, dtype=torch.bfloat16, max_sequences=6, options={"prefill_tokens": 24}
        )
        found = toolbox.run(made, prompts, max_tokens=24, min_tokens=24)
        gaps = [
            torch.tensor(c.logprobs_t1).double() - teacher_forced(model, prompts[place].token_ids, c)
            for (place, _), c in found.items()
        ]
        errors[name] = float(torch.cat(gaps).square().mean().sqrt())
    # 384 log-probs a side: the ratio of two such root mean squares scatters by some 10 percent.
    assert errors["planned"] < 1.5 * errors["reference"], (errors, chosen)


def test_weights_can_be_updated_through_packed_layers(model: Any, engine: Any, toolbox: Any) -> None:
    backend, _ = toolbox.planned(model.arch, "bfloat16")
    other = dataclasses.replace(model, hf=model.other)
    prompts = toolbox.prompts_of([9, 5], 2)
    made = engine(model, backend=backend, dtype=torch.bfloat16)
    made.load_weights(other.tensors(), 2)
    fresh = engine(other, backend=backend, dtype=torch.bfloat16)
    assert {k: c.token_ids for k, c in toolbox.run(made, prompts).items()} == {
        k: c.token_ids for k, c in toolbox.run(fresh, prompts).items()
    }
