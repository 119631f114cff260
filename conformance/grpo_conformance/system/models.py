"""Tiny random models, one of each kind, as folders that `grpo train` reads. No network, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grpo_core.backend import reference_backend
from grpo_core.errors import ConfigError
from grpo_core.model.checkpoint_io import copy_side_files, read_tensors, write_checkpoint
from grpo_core.model.hf_config import read_hf_config
from grpo_core.model.initialise import initialise
from grpo_core.model.transformer import Decoder

from .task import VOCABULARY, write_tokenizer

if TYPE_CHECKING:
    from grpo_core.catalogue import Catalogue
    from grpo_core.model.plugin import ModelPlugin

SPREAD = 0.15
"""Standard deviation of matrices: hidden states stay near 1, so that experts and heads matter."""
NOISE = 0.1
"""Of norms, biases and the selection bias, which would start as ones and zeros and hide mistakes."""
CHOOSY = 2.0
"""By what routers' weights are larger than others: fewer near ties, which roundings decide."""
ROUTER = ".mlp.router.weight"
"""Ending of their names in the decoder."""
CONVENTIONAL = ("A_log", "dt_bias")
"""Vectors that keep their usual start."""

COMMON: Mapping[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
"""Every head dim and rank of all models is 16 or a multiple of it: devices refuse others."""
EXPERTS: Mapping[str, Any] = {
    "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
}  # fmt: skip
TIED: Mapping[str, Any] = {"tie_word_embeddings": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of model with the architectures that stand for it; the first that a plugin serves is taken."""

    name: str
    configs: tuple[Mapping[str, Any], ...]
    """config.json of each."""
    experts: bool = False


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="dense",
            configs=(
                {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, **TIED},
                {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 16, **TIED},
                {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **TIED},
            ),
        ),
        Kind(
            name="gated_delta",
            experts=True,
            configs=(
                {
                    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **EXPERTS,
                    "head_dim": 16, "partial_rotary_factor": 0.5, "shared_expert_intermediate_size": 16,
                    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
                    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
                    "layer_types": ["linear_attention", "full_attention"], "num_nextn_predict_layers": 0,
                },
            ),
        ),
        Kind(
            name="mla",
            experts=True,
            configs=(
                {
                    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **EXPERTS,
                    "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16,
                    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
                    "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
                    "first_k_dense_replace": 1, "routed_scaling_factor": 2.0, "scoring_func": "sigmoid",
                    "topk_method": "noaux_tc", "num_nextn_predict_layers": 0,
                },
            ),
        ),
    )
}  # fmt: skip


def served(kind: Kind, catalogue: Catalogue) -> tuple[ModelPlugin, Mapping[str, Any]] | str:
    """The family for a kind of model with its config.json, or why there is none."""
    reasons = []
    for config in kind.configs:
        whole = {**COMMON, **config}
        try:
            return catalogue.model_plugin_for(whole["architectures"]), whole
        except ConfigError as error:
            reasons.append(error.what)
    return "; ".join(reasons)


def write_model(folder: Path, family: ModelPlugin, config: Mapping[str, Any], *, seed: int) -> Path:
    """A checkpoint in float32 whose every tensor is random, with a tokenizer of one token a character."""
    arch = family.arch(config)
    decoder = Decoder(arch, reference_backend(), device="cpu", dtype=torch.float32)
    initialise(decoder, seed, SPREAD)
    generator = torch.Generator().manual_seed(seed + 1)
    state = decoder.state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 1 and not name.endswith(CONVENTIONAL):
            tensor.add_(NOISE * torch.randn(tensor.shape, generator=generator))
        if name.endswith(ROUTER):
            tensor.mul_(CHOOSY)
        # Equal in both dtypes, so that a weight on its way from one place to another never is rounded.
        tensor.copy_(tensor.bfloat16())
    write_checkpoint(folder, family.weights(arch).export(state), config)
    write_tokenizer(folder)
    return folder


def jolt(source: Path, folder: Path, size: float, *, seed: int = 0) -> Path:
    """A copy of a model whose weights are each multiplied by 1 +- `size` at random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = (
        # In float32: bfloat16 would round small changes away.
        (name, tensor.float() * (1 + size * (2 * torch.randint(2, tensor.shape, generator=generator) - 1)))
        for name, tensor in read_tensors(source)
    )
    write_checkpoint(folder, tensors, read_hf_config(source))
    copy_side_files(source, folder)
    return folder
