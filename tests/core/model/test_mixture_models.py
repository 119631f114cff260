"""MoE, MLA and gated delta decoders against transformers' own models: logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    FAMILIES,
    by_checkpoint_name,
    decoder_of,
    packed_logits,
    random_sequences,
    tiny_hf_model,
)  # fmt: skip

NEXT_KINDS = ["linear_attention", "full_attention", "linear_attention"]
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 80,
    "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-one-expert": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "qwen3-moe-all-experts": ("qwen3_moe", {"num_experts_per_tok": 6}),
    "qwen3-moe-weights-not-normed": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
    "qwen3-moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "qwen3-moe-tied-one-kv-head": ("qwen3_moe", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "deepseek": ("deepseek_v3", {}),
    "deepseek-queries-at-once": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "deepseek-one-expert": ("deepseek_v3", {"num_experts_per_tok": 1, "topk_group": 1}),
    "deepseek-all-experts": (
        "deepseek_v3", {"num_experts_per_tok": 8, "topk_group": 4, "first_k_dense_replace": 0}
    ),
    "deepseek-values-wider-than-keys": ("deepseek_v3", {"v_head_dim": 22, "qk_nope_head_dim": 7}),
    "deepseek-yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "deepseek-biases-not-normed": ("deepseek_v3", {"attention_bias": True, "norm_topk_prob": False}),
    "deepseek-eps-of-latents-apart": ("deepseek_v3", {"rms_norm_eps": 0.1}),
    "deepseek-not-interleaved": ("deepseek_v3", {"rope_interleave": False}),
    "qwen3-next": ("qwen3_next", {}),
    "qwen3-next-attention-between": ("qwen3_next", {"layer_types": NEXT_KINDS, "mlp_only_layers": [0]}),
    "qwen3-next-value-heads-as-key-heads": ("qwen3_next", {"linear_num_value_heads": 2}),
    "qwen3-next-one-expert": ("qwen3_next", {"num_experts_per_tok": 1, "linear_conv_kernel_dim": 2}),
    "qwen3-next-all-experts": ("qwen3_next", {"num_experts_per_tok": 6}),
    "qwen3-next-no-attention": ("qwen3_next", {"layer_types": ["linear_attention"] * 3}),
    "qwen3-next-tied": ("qwen3_next", {"tie_word_embeddings": True, "norm_topk_prob": False}),
}  # fmt: skip
# float32 through three layers: both sides round differently about 100 times, 1e-4 is 800 ulp.
FORWARD, BACKWARD = 1e-4, 1e-3


def model_of(name: str) -> Any:
    family, settings = MODELS[name]
    # The norm after the delta rule magnifies rounding where its input is small; a larger eps bounds that.
    eps = {"rms_norm_eps": 1e-2} if family == "qwen3_next" else {}
    model = tiny_hf_model(family, max_position_embeddings=320, **eps | settings)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Gates in their linear range and routers with clear choices: rounding must not flip an expert.
            if parameter_name.endswith("mlp.gate.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


def sequences_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Without token 0, the padding: its embedding is zero in transformers, has no gradient there, and the
    norms after it magnify rounding."""
    return [1 + sequence for sequence in random_sequences(lengths, 52, seed)]


def reference_logits(model: Any, sequences: list[torch.Tensor]) -> torch.Tensor:
    # Its cache cannot be made for a model without attention.
    return torch.cat([model(sequence[None], use_cache=False).logits[0] for sequence in sequences])


@pytest.mark.parametrize("name", MODELS)
def test_mixture_logits_equal_transformers(name: str, backend: Any) -> None:
    model = model_of(name)
    sequences = sequences_of([13, 1, 70, 2])
    with torch.no_grad():
        theirs = reference_logits(model, sequences)
        ours = packed_logits(decoder_of(model, backend), sequences)
    assert theirs.abs().max() > 0.5, "logits near zero would hide a difference"
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < FORWARD


@pytest.mark.parametrize("name", MODELS)
def test_mixture_gradients_equal_transformers(name: str, backend: Any) -> None:
    model = model_of(name)
    decoder = decoder_of(model, backend)
    sequences = sequences_of([9, 1, 40])
    weight = torch.randn(50, 53, generator=torch.Generator().manual_seed(1))
    (reference_logits(model, sequences) * weight).sum().backward()
    (packed_logits(decoder, sequences) * weight).sum().backward()
    family = FAMILIES[model.config.model_type]()
    weight_map = family.weights(family.arch(model.config.to_dict()))
    grads = {name: gradient_of(p) for name, p in decoder.named_parameters()}
    grads |= {name: torch.zeros_like(buffer) for name, buffer in decoder.named_buffers()}
    ours = dict(weight_map.export(grads))
    theirs = dict(by_checkpoint_name((n, gradient_of(p)) for n, p in model.named_parameters()))
    assert theirs.keys() == {n for n in ours if not n.endswith("e_score_correction_bias")}
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for parameter, gradient in theirs.items():
        # A router of one normed expert has a gradient of zero, which rounding makes noise: the floor.
        scale = max(float(gradient.norm()), 1e-3 * largest)
        assert float((ours[parameter] - gradient).norm()) / scale < BACKWARD, parameter


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek", "qwen3-next"])
def test_mixture_logits_of_three_hundred_packed_tokens(name: str, backend: Any) -> None:
    model = model_of(name)
    sequences = sequences_of([300, 1, 64, 129])
    with torch.no_grad():
        theirs = reference_logits(model, sequences)
        ours = packed_logits(decoder_of(model, backend), sequences)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < FORWARD
