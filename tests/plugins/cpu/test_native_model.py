"""A whole model on the C++ pack: as near to float32 as the reference ops in bfloat16 are, gradients too."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch

from grpo_core.backend import Backend, import_pointer, reference_backend
from grpo_cpu.native import compiler, cpu_flags
from grpo_cpu.native_offers import offers

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
importlib.import_module("grpo_cpu.native_ops")

LENGTHS, PARENTS = [21, 40, 1, 33, 7, 12], [-1, 0, 0, 0, -1, 4]


def native_backend(dtype: str = "bfloat16") -> Backend:
    """The reference ops with those of the pack that serve a dtype in their places."""
    backend = reference_backend()
    for _, offer in offers():
        if dtype not in offer.limits["dtype"]:
            continue
        space, _, name = offer.op.partition(".")
        slots = replace(getattr(backend, space), **{name: import_pointer(offer.load)})
        backend = replace(backend, **{space: slots})
    return backend


def results(
    hf_model: Any, backend: Backend, dtype: torch.dtype, recompute: bool = False
) -> list[torch.Tensor]:
    """Log-probs, entropies and the gradient of every parameter, for packed groups with shared prompts."""
    decoder = tiny_models.decoder_of(hf_model, backend, dtype)
    tokens = torch.cat(tiny_models.random_sequences(LENGTHS, 53))
    starts = [LENGTHS[parent] if parent >= 0 else 0 for parent in PARENTS]
    positions = [torch.arange(s, s + length) for s, length in zip(starts, LENGTHS, strict=True)]
    hidden = decoder(
        tokens, torch.cat(positions), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        parents=torch.tensor(PARENTS).int(), max_seqlen=max(LENGTHS), recompute=recompute,
    )  # fmt: skip
    logprob, entropy = backend.loss.logprob(
        hidden[:-1], decoder.head_weight(), tokens[1:], temperature=0.9, group=None
    )
    (logprob.mean() + 0.1 * entropy.mean()).backward()
    return [logprob.detach(), entropy.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_values_and_gradients_are_as_near_to_float32_as_the_references(family: str) -> None:
    model = tiny_models.tiny_hf_model(
        family, hidden_size=72, intermediate_size=104, head_dim=32, num_hidden_layers=2, initializer_range=0.1
    )
    exact = results(model, reference_backend(), torch.float32)
    ours, theirs = (results(model, b, torch.bfloat16) for b in (native_backend(), reference_backend()))
    assert len(ours) == len(theirs) == len(exact)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        scale = want.norm().clamp_min(1e-9)
        # The pack also rounds logits, their gradients and the weights of attention: the errors are of one
        # kind and size, and no tensor may be off by more than a few per cent.
        limit = max(2 * ((other.float() - want).norm() / scale).item(), 2**-6)
        assert (got.float() - want).norm() / scale < limit


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_float32_values_and_gradients_are_those_of_the_references(family: str) -> None:
    model = tiny_models.tiny_hf_model(
        family, hidden_size=72, intermediate_size=104, head_dim=32, num_hidden_layers=2, initializer_range=0.1
    )
    ours, theirs = (
        results(model, backend, torch.float32) for backend in (native_backend("float32"), reference_backend())
    )
    for got, want in zip(ours, theirs, strict=True):
        # Sums of some hundred float32 products in another order, through two layers and back.
        assert (got - want).norm() / want.norm().clamp_min(1e-9) < 2e-5


def test_recomputed_activations_give_the_same_bits() -> None:
    model = tiny_models.tiny_hf_model("qwen3", head_dim=32)
    plain, again = (results(model, native_backend(), torch.bfloat16, recompute=r) for r in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
