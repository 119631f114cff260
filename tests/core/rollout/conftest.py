"""Tiny random models with their transformers twins, and engines over the reference ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core.backend import Backend, bind, reference_backend
from grpo_core.devices.pick import pick_device
from grpo_core.model.arch import Arch
from grpo_core.needs import RunFacts, needs_of
from grpo_core.plugins import load
from grpo_core.resolve import resolve
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
# Sizes that are no powers of two, head dims that differ for keys and values, fewer groups than experts.
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 16}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2,
    "moe_intermediate_size": 20, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "num_hidden_layers": 3, "routed_scaling_factor": 1.7,
}  # fmt: skip
NEXT = {
    **EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12,
    "linear_value_head_dim": 10, "linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 28,
    "num_hidden_layers": 3, "partial_rotary_factor": 0.5, "norm_topk_prob": True,
}  # fmt: skip
MIXED: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3_moe-dense-first": {
        **EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [0], "num_hidden_layers": 3,
    },
    "deepseek_v3": {**LATENT, "q_lora_rank": None},
    "deepseek_v3-q-lora": {**LATENT, "q_lora_rank": 14, "attention_bias": True},
    "qwen3_next": {**NEXT, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_next-recurrent": {**NEXT, "layer_types": ["linear_attention"] * 3},
}  # fmt: skip


# Heads of 64 and sizes in multiples of 32, so that fused kernels accept the model; narrow enough to be quick.
KERNEL_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "initializer_range": 0.15,
}  # fmt: skip
WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "initializer_range": 0.15}
WIDE_MLA = {**WIDE, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
WIDE_DELTA = {**WIDE, "head_dim": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
KERNEL_MIXED: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {**WIDE, "head_dim": 64},
    "qwen3_moe-dense-first": {**WIDE, "head_dim": 64},
    "deepseek_v3": WIDE_MLA,
    "deepseek_v3-q-lora": {**WIDE_MLA, "q_lora_rank": 32},
    "qwen3_next": WIDE_DELTA,
    "qwen3_next-recurrent": WIDE_DELTA,
}


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
        frozen = [(n, t) for n, t in self.hf.named_buffers() if n.endswith("e_score_correction_bias")]
        return [(name, tensor.detach()) for name, tensor in [*self.hf.named_parameters(), *frozen]]


def hf_model(family: str, seed: int, **sizes: Any) -> Any:
    import transformers as tf

    kind = family.split("-")[0]
    config_class, model_class = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
        "qwen3_moe": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM),
        "deepseek_v3": (tf.DeepseekV3Config, tf.DeepseekV3ForCausalLM),
        "qwen3_next": (tf.Qwen3NextConfig, tf.Qwen3NextForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **{**FAMILIES, **MIXED}[family], **sizes})).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
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


@pytest.fixture(scope="session")
def kernel_tiny() -> Callable[..., Tiny]:
    """Makes a tiny model of a family with sizes that fused kernels take."""
    return lambda family, seed=0: make_tiny(family, seed, **KERNEL_MIXED.get(family, KERNEL_SIZES))


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


def greedy_of(model: Any, token_ids: tuple[int, ...], new: int) -> list[int]:
    """transformers' own greedy continuation, up to the stop token."""
    ids = torch.tensor([token_ids])
    # Its cache cannot tell the length of a model that is recurrent in all layers.
    kinds = set(getattr(model.config, "layer_types", None) or ())
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None,
        pad_token_id=0, use_cache=kinds != {"linear_attention"},
    )  # fmt: skip
    found: list[int] = out[0, len(token_ids) :].tolist()
    return found[: found.index(STOP) + 1] if STOP in found else found


def logits_after(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """float64 logits [len(completion), V] that predict each completion token, teacher forced."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
    return logits[len(prompt) - 1 : -1]


def planned(arch: Any, dtype: str, **facts: Any) -> tuple[Backend, dict[str, str]]:
    """The bound plan and the offer of each op."""
    catalogue = load(off=())
    _, info = pick_device("cpu", catalogue)
    needs = needs_of(arch, RunFacts(train_dtype=dtype, rollout_dtype=dtype, **facts))
    plan = resolve(needs, catalogue, info, pins={}, fallback="none")
    return bind(plan), {row.op: row.chosen or "" for row in plan.choices}


@pytest.fixture
def toolbox() -> Any:
    """`prompts_of`, `run` and the constants, for tests (which cannot import a conftest by name)."""
    from types import SimpleNamespace

    return SimpleNamespace(
        prompts_of=prompts_of,
        run=run,
        Letters=Letters,
        VOCAB=VOCAB,
        STOP=STOP,
        FAMILIES=FAMILIES,
        MIXED=MIXED,
        greedy_of=greedy_of,
        planned=planned,
        logits_after=logits_after,
    )
