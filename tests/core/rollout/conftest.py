"""Tiny random models with their transformers twins, and engines over the reference ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core.backend import Backend, reference_backend
from grpo_core.model.arch import Arch
from grpo_core.rollout.base import RolloutSetup
from grpo_core.rollout.engine import NativeRollout
from grpo_core.types import Completion, Prompt, Sampling

VOCAB = 61
STOP = 60
LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789.,;:!?+-*/=()<>[]{}_|"

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3, "eos_token_id": STOP, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2-bias": {"tie_word_embeddings": True},
    "qwen3-qk-norm": {"head_dim": 16, "tie_word_embeddings": False},
    "qwen2-window": {
        "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    },
}  # fmt: skip


class Letters:
    """A `Chat` of one letter a token: id i is LETTERS[i]; the stop token has no text."""

    eos_token_id = STOP
    stop_token_ids = (STOP,)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(LETTERS.index(letter) for letter in text)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(LETTERS[i] if i < len(LETTERS) else "" for i in ids)


@dataclass(frozen=True)
class Tiny:
    """A random model: transformers' own and what the engine needs of it."""

    hf: Any
    arch: Arch
    weight_map: Any
    other: Any = None
    """The same network with other weights."""

    def tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor.detach()) for name, tensor in self.hf.named_parameters()]


def hf_model(family: str, seed: int, **sizes: Any) -> Any:
    import transformers as tf

    kind = family.split("-")[0]
    config_class, model_class = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **FAMILIES[family], **sizes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_tiny(family: str, seed: int = 0, **sizes: Any) -> Tiny:
    from grpo_models.plugin import grpo_models

    model = hf_model(family, seed, **sizes)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    plugin = next(p for p in grpo_models() if type(model).__name__ in p.architectures)
    arch = plugin.arch(config)
    other = hf_model(family, seed + 1, **sizes)
    return Tiny(hf=model, arch=arch, weight_map=plugin.weights(arch), other=other)


@pytest.fixture(scope="session")
def sized_tiny() -> Callable[..., Tiny]:
    """Makes a tiny model of a family with sizes of one's own."""
    return lambda family, **sizes: make_tiny(family, 0, **sizes)


EngineMaker = Callable[..., NativeRollout]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Tiny]:
    """Makes (and keeps) the tiny model of a family and seed."""
    made: dict[tuple[str, int], Tiny] = {}

    def get(family: str = "llama-tied", seed: int = 0) -> Tiny:
        if (family, seed) not in made:
            made[family, seed] = make_tiny(family, seed)
        return made[family, seed]

    return get


@pytest.fixture
def engine() -> EngineMaker:
    """Makes an engine with the weights of a tiny model."""

    def make(
        model: Tiny, *, backend: Backend | None = None, load: bool = True, **changes: Any
    ) -> NativeRollout:
        settings: dict[str, Any] = {
            "arch": model.arch, "weight_map": model.weight_map, "chat": Letters(),
            "backend": backend or reference_backend(), "device": torch.device("cpu"), "dtype": torch.float32,
            "model_path": "", "max_sequences": 8, "max_model_len": 64, "options": {},
        } | changes  # fmt: skip
        made = NativeRollout(RolloutSetup(**settings))
        if load:
            made.load_weights(model.tensors(), 1)
        return made

    return make


def prompts_of(lengths: Sequence[int], group: int, *, seed: int = 0) -> list[Prompt]:
    """Random prompts; request (prompt p, sample g) has seed 1000 p + g."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            id=place,
            token_ids=tuple(torch.randint(0, STOP, (length,), generator=draw).tolist()),
            seeds=tuple(1000 * place + g for g in range(group)),
        )
        for place, length in enumerate(lengths)
    ]


def run(
    engine: NativeRollout, prompts: Sequence[Prompt], **sampling: Any
) -> dict[tuple[int, int], Completion]:
    """All completions by (prompt, sample); each exactly once."""
    found: dict[tuple[int, int], Completion] = {}
    for completion in engine.generate(prompts, Sampling(**{"max_tokens": 8, **sampling})):
        key = (completion.prompt_id, completion.index)
        assert key not in found
        found[key] = completion
    return found


@pytest.fixture
def toolbox() -> Any:
    """`prompts_of`, `run` and the constants, for tests (which cannot import a conftest by name)."""
    from types import SimpleNamespace

    return SimpleNamespace(
        prompts_of=prompts_of, run=run, Letters=Letters, VOCAB=VOCAB, STOP=STOP, FAMILIES=FAMILIES, Path=Path
    )
