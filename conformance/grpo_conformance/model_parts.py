"""What the model checks compute: both models' logits and gradients, under the names of the checkpoint."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_core.backend import reference_backend
from grpo_core.model.checkpoint_io import load_checkpoint, read_tensors
from grpo_core.model.transformer import Decoder

if TYPE_CHECKING:
    from .model_case import ModelCase


def randomise(hf_model: Any, seed: int = 0, spread: float = 0.3) -> Any:
    """Add noise to every vector (norms, biases, the selection bias of experts), which start as ones and zeros
    and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    held = hf_model.state_dict(keep_vars=True)
    with torch.no_grad():
        for vector in held.values():
            if vector.ndim == 1 and vector.is_floating_point():
                noise = torch.randn(vector.shape, generator=generator)
                vector.add_(spread * noise.to(vector.dtype))
    return hf_model


def sequences(case: ModelCase) -> list[Tensor]:
    """int64 random token sequences of the case's lengths."""
    vocab = case.family.arch(case.hf_config).vocab_size
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randint(vocab, (length,), generator=generator) for length in case.lengths]


def load_decoder(case: ModelCase) -> Decoder:
    """Our decoder with the weights of the transformers model, read from files as `grpo train` reads them."""
    arch = case.family.arch(case.hf_config)
    backend = case.backend or reference_backend()
    decoder = Decoder(arch, backend, device="cpu", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        case.hf_model.save_pretrained(folder)
        load_checkpoint(Path(folder), case.family.weights(arch), decoder.state_dict())
    return decoder


def their_logits(hf_model: Any, tokens: list[Tensor]) -> Tensor:
    """float32 [T, V]: each sequence in a pass of its own, one after the other."""
    hf_model.eval()
    return torch.cat([hf_model(sequence[None], use_cache=False).logits[0] for sequence in tokens])


def our_logits(decoder: Decoder, tokens: list[Tensor]) -> Tensor:
    """float32 [T, V]: all sequences packed into one pass."""
    lengths = [len(sequence) for sequence in tokens]
    hidden_TC = decoder(
        torch.cat(tokens),
        torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        parents=None,
        max_seqlen=max(lengths),
        recompute=False,
    )
    logits_TV: Tensor = hidden_TC @ decoder.head_weight().T
    return logits_TV


def gradients_by_name(case: ModelCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours, theirs): gradients of a random projection of the logits, by checkpoint name."""
    tokens = sequences(case)
    decoder = load_decoder(case)
    ours_TV = our_logits(decoder, tokens)
    generator = torch.Generator().manual_seed(case.seed + 1)
    weight_TV = torch.randn(ours_TV.shape, generator=generator)
    (ours_TV * weight_TV).sum().backward()  # type: ignore[no-untyped-call]
    table = case.family.weights(case.family.arch(case.hf_config))
    parameters = dict(decoder.named_parameters())
    found = {}
    for name, value in decoder.state_dict().items():
        gradient = parameters[name].grad if name in parameters else None
        # NaN marks a frozen buffer (a router's bias), to be left out again under its checkpoint name; a
        # parameter without a gradient belongs to experts that no token chose.
        mark = torch.zeros_like(value) if name in parameters else torch.full_like(value, torch.nan)
        found[name] = mark if gradient is None else gradient
    ours = {name: value for name, value in table.export(found) if not bool(value.isnan().all())}
    return ours, _their_gradients(case.hf_model, tokens, weight_TV, ours.keys())


def _their_gradients(hf_model: Any, tokens: list[Tensor], weight_TV: Tensor, names: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(hf_model)
    model.zero_grad()
    (their_logits(model, tokens) * weight_TV).sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    # Saved as if they were weights: a checkpoint may be laid out unlike the module's own parameters
    # (transformers 5 keeps experts in one tensor), and only save_pretrained knows how.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: value for name, value in read_tensors(Path(folder)) if name in names}
