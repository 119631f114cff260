"""Tiny checkpoints with experts, made by transformers, that reinforcement learning can teach something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import write_tokenizer

# Matrices of this size keep hidden states near 1, so that experts matter and near ties between them occur.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    # transformers would start this row of the embedding at zero, which no trained checkpoint has; see
    # test_zero_embedding_row.py.
    "pad_token_id": None,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    # MLA, sigmoid scores with groups, a selection bias and a shared expert; the first layer is dense.
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 32, "n_group": 4, "topk_group": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.0,
    },
    # Gated delta and gated attention, softmax scores, a gated shared expert.
    "qwen3_next": {
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 32, "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
}  # fmt: skip
HF_NAMES = {"deepseek_v3": "DeepseekV3", "qwen3_next": "Qwen3Next"}


def write_tiny_mixture(folder: Path, family: str, **settings: Any) -> Path:
    """A random checkpoint in float32 with a tokenizer of one token a character."""
    import torch
    import transformers

    vocab_size = write_tokenizer(folder)
    sizes = {**SIZES, **FAMILY_SIZES[family], "vocab_size": vocab_size, **settings}
    config = getattr(transformers, f"{HF_NAMES[family]}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{HF_NAMES[family]}ForCausalLM")(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return folder


ECHO = """
def echo(text, sample):
    return sum(character == sample.answer for character in text) / 8
"""
"""The module of a reward: the share of a completion's eight tokens that are the letter of its prompt."""


def write_echo_recipe(folder: Path, model: Path) -> Path:
    """A run in which the model learns to repeat the letter that its prompt is made of."""
    rows = [{"prompt": 3 * letter, "answer": letter} for letter in "abcd"]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "echo_reward.py").write_text(ECHO)
    path = folder / "echo.yaml"
    path.write_text(
        f"""model: {model}
device: cpu
data:
  train: {folder}/letters.jsonl
  options: {{plain: true}}
rewards:
  - name: echo_reward:echo
algo:
  group_size: 8
rollout:
  prompts: 8
  max_tokens: 8
train:
  steps: 4
  lr: 5e-3
  dtype: float32
run:
  dir: {folder}/run
  threads: 1
"""
    )
    return path
