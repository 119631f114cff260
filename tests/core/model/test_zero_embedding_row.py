"""A token whose embedding is zero has an enormous gradient, which is the function's and not ours.

transformers starts the embedding of `pad_token_id` at zero and keeps it there; RMSNorm has its largest slope
at zero, 1 / sqrt(eps) = 1000, and gated delta layers pass nothing on from it, so that it reaches the first
layer with attention unchanged. A run whose random model draws that token then reports gradient norms of 1e4
and more. In a trained checkpoint the row is not zero.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import decoder_of, packed_logits, tiny_hf_model

from grpo_core.backend import reference_backend


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe", "deepseek_v3"])
def test_gradient_of_a_zero_embedding_row_is_that_of_float64(family: str) -> None:
    model = tiny_hf_model(family, rms_norm_eps=1e-6)
    model.config._experts_implementation = "eager"
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 0
    # Only the row of zeros is wanted here, not that it is frozen.
    embedding.padding_idx = None
    with torch.no_grad():
        embedding.weight[0] = 0.0
    generator = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(3, 53, (24,), generator=generator)
    tokens_T[[5, 11]] = 0
    decoder = decoder_of(model, reference_backend())
    score(packed_logits(decoder, [tokens_T]), tokens_T).backward()
    exact = model.double()
    score(exact(tokens_T[None]).logits[0], tokens_T).backward()
    wanted_VC, found_VC = embedding.weight.grad, decoder.embed.weight.grad
    if family == "qwen3_next":
        assert wanted_VC[0].norm() > 100 * wanted_VC[1:].norm()
    # Float32 through three layers; elsewhere in the tests the same models agree to 1e-3.
    for rows in (slice(0, 1), slice(1, None)):
        error = (found_VC[rows] - wanted_VC[rows]).norm() / wanted_VC[rows].norm()
        assert error < 1e-3


def score(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """The log-probability of the sequence."""
    return logits_TV[:-1].log_softmax(-1).gather(1, tokens_T[1:, None]).sum()
