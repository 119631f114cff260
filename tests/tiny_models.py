"""Tiny random models of each family with odd shapes, made by transformers, and their decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grpo_models.llama import Llama
from grpo_models.qwen2 import Qwen2
from grpo_models.qwen3 import Qwen3

if TYPE_CHECKING:
    import torch

    from grpo_core.backend import Backend
    from grpo_core.model.transformer import Decoder

FAMILIES = {"llama": Llama, "qwen2": Qwen2, "qwen3": Qwen3}
HF_NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
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


def tiny_hf_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A float32 transformers model; every vector (norms, biases) is random too, so that none is idle."""
    import torch
    import transformers

    name = HF_NAMES[family]
    sizes = SIZES | ({"head_dim": 10} if family == "qwen3" else {}) | settings
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "norm" in parameter_name else 0.0
                parameter.copy_(center + 0.3 * torch.randn_like(parameter))
    model.config.architectures = [type(model).__name__]
    return model


def decoder_of(hf_model: Any, backend: Backend, dtype: torch.dtype | None = None) -> Decoder:
    """Our decoder with the same weights, through the family's arch and weight map."""
    import torch

    from grpo_core.model.transformer import Decoder

    family = FAMILIES[hf_model.config.model_type]()
    arch = family.arch(hf_model.config.to_dict())
    decoder = Decoder(arch, backend, device="cpu", dtype=dtype or torch.float32)
    family.weights(arch).load(hf_model.state_dict().items(), dict(decoder.named_parameters()))
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
