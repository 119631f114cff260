"""Tiny random models of each family with odd shapes, made by transformers, and their decoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grpo_models.deepseek_v3 import DeepseekV3
from grpo_models.llama import Llama
from grpo_models.qwen2_5 import Qwen2
from grpo_models.qwen3 import Qwen3
from grpo_models.qwen3_moe import Qwen3Moe
from grpo_models.qwen3_next import Qwen3Next

if TYPE_CHECKING:
    import torch

    from grpo_core.backend import Backend
    from grpo_core.model.transformer import Decoder

FAMILIES = {
    "llama": Llama, "qwen2": Qwen2, "qwen3": Qwen3, "qwen3_moe": Qwen3Moe, "deepseek_v3": DeepseekV3,
    "qwen3_next": Qwen3Next,
}  # fmt: skip
HF_NAMES = {
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe",
    "deepseek_v3": "DeepseekV3", "qwen3_next": "Qwen3Next",
}  # fmt: skip
# Three query heads share a key-value head; nothing is a power of two.
SIZES = {
    "vocab_size": 53,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 10},
    "qwen3_moe": {
        "head_dim": 10, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "norm_topk_prob": True, "mlp_only_layers": [1],
    },
    # Queries and keys are wider than values; the first layer is dense.
    "deepseek_v3": {
        "num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 20, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    },
    # Two gated delta layers before one with attention; three value heads share a key head.
    "qwen3_next": {
        "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
        "linear_key_head_dim": 10, "linear_value_head_dim": 14, "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], "mlp_only_layers": [1],
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip


def tiny_hf_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A float32 transformers model; every vector (norms, biases, the selection bias of experts) is random
    too, so that none is idle."""
    import torch
    import transformers

    name = HF_NAMES[family]
    sizes = SIZES | FAMILY_SIZES.get(family, {}) | settings
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not parameter_name.endswith("A_log"):
                parameter.copy_(_center(family, parameter_name) + 0.3 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
    model.config.architectures = [type(model).__name__]
    return model


def _center(family: str, name: str) -> float:
    zero_centered = family == "qwen3_next" and "linear_attn" not in name
    return 1.0 if "norm" in name and not zero_centered else 0.0


def by_checkpoint_name(tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """transformers 5 keeps all experts of a layer in one tensor; a checkpoint has one tensor for each."""
    for name, tensor in tensors:
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj" and prefix.endswith("experts"):
            for expert, both in enumerate(tensor):
                for part, rows in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    yield f"{prefix}.{expert}.{part}.weight", rows
        elif last == "down_proj" and prefix.endswith("experts"):
            for expert, rows in enumerate(tensor):
                yield f"{prefix}.{expert}.down_proj.weight", rows
        else:
            yield name, tensor


def decoder_of(hf_model: Any, backend: Backend, dtype: torch.dtype | None = None, **settings: Any) -> Decoder:
    """Our decoder with the same weights, through the family's arch and weight map."""
    import torch

    from grpo_core.model.transformer import Decoder

    family = FAMILIES[hf_model.config.model_type]()
    arch = family.arch(hf_model.config.to_dict())
    decoder = Decoder(arch, backend, device="cpu", dtype=dtype or torch.float32, **settings)
    everything = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    family.weights(arch).load(by_checkpoint_name(hf_model.state_dict().items()), everything)
    return decoder


def random_sequences(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[torch.Tensor]:
    """int64 token sequences."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


def packed_hidden(
    decoder: Decoder, sequences: Sequence[torch.Tensor], *, recompute: bool = False
) -> torch.Tensor:
    """Hidden states [T, C] of the sequences packed one after the other."""
    import torch

    lengths = [len(sequence) for sequence in sequences]
    return decoder(
        torch.cat(list(sequences)),
        torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        parents=None,
        max_seqlen=max(lengths),
        recompute=recompute,
    )


def packed_logits(decoder: Decoder, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits [T, V] of the sequences packed one after the other."""
    return packed_hidden(decoder, sequences) @ decoder.head_weight().T
