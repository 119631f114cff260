"""Random models of every family at sizes a CPU can train, written by transformers' own classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What the families of one table have in common."""

    hidden: int
    layers: int
    experts: int
    top_k: int


SIZES = {
    "tiny": Size(hidden=64, layers=2, experts=4, top_k=2),
    "small": Size(hidden=256, layers=4, experts=16, top_k=4),
    "medium": Size(hidden=512, layers=8, experts=64, top_k=8),
}
FAMILIES = ("qwen2.5", "qwen3", "qwen3-moe", "moonlight", "deepseek-v3", "qwen3-next")
SPARSE = frozenset({"qwen3-moe", "moonlight", "deepseek-v3", "qwen3-next"})


def family_config(family: str, size: Size) -> tuple[str, dict[str, Any]]:
    """(transformers class without its ending, config) in the proportions of the published models."""
    hidden = size.hidden
    heads = hidden // 64 or 1
    common = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2), "head_dim": 64,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "intermediate_size": 4 * hidden,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    if family in ("qwen2.5", "qwen3"):
        return ("Qwen2" if family == "qwen2.5" else "Qwen3"), common
    if family in ("moonlight", "deepseek-v3"):
        return "DeepseekV3", {**common, **_deepseek(family, size)}
    experts = {
        "num_experts": size.experts, "num_experts_per_tok": size.top_k, "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0,
    }  # fmt: skip
    if family == "qwen3-moe":
        return "Qwen3Moe", {**common, **experts, "moe_intermediate_size": 3 * hidden // 8}
    if family == "qwen3-next":
        linear: dict[str, Any] = {
            "linear_num_key_heads": max(1, heads // 2), "linear_num_value_heads": heads,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4,
        }  # fmt: skip
        # Every fourth layer attends, as published; in a shorter model the last one.
        every = min(4, size.layers)
        linear["layer_types"] = [
            "linear_attention" if (index + 1) % every else "full_attention" for index in range(size.layers)
        ]
        inner = {"moe_intermediate_size": hidden // 4, "shared_expert_intermediate_size": hidden // 4}
        return "Qwen3Next", {**common, **experts, **linear, **inner}
    raise ValueError(f"no family is called {family!r}; known: {', '.join(FAMILIES)}")


def _deepseek(family: str, size: Size) -> Mapping[str, Any]:
    # Moonlight: one group, no query LoRA, two shared experts; V3: groups, query LoRA, one shared expert.
    moonlight, hidden, heads = family == "moonlight", size.hidden, size.hidden // 64 or 1
    return {
        "num_key_value_heads": heads, "head_dim": 32, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "v_head_dim": 64, "kv_lora_rank": max(32, hidden // 4),
        "q_lora_rank": None if moonlight else max(32, 3 * hidden // 8), "first_k_dense_replace": 1,
        "moe_intermediate_size": 11 * hidden // 16 // 8 * 8 if moonlight else 3 * hidden // 8,
        "n_routed_experts": size.experts, "num_experts_per_tok": size.top_k,
        "n_shared_experts": 2 if moonlight else 1, "n_group": 1 if moonlight else 2,
        "topk_group": 1, "routed_scaling_factor": 2.446 if moonlight else 2.5, "norm_topk_prob": True,
    }  # fmt: skip


def write_model(folder: Path, family: str, size: Size) -> Path:
    """A seeded random checkpoint in Hugging Face layout with a tokenizer of one token a number."""
    import torch
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    kind, settings = family_config(family, size)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *map(str, range(VOCABULARY - 4))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
