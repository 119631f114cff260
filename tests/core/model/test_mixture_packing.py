"""Packing, shared prompts and recompute with every mixer and a mixture of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixture_layouts import apart, packed, shared_groups, tokens, weighted
from tiny_models import decoder_of, tiny_hf_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", {}),
    "deepseek": ("deepseek_v3", {}),
    "deepseek-queries-at-once": ("deepseek_v3", {"q_lora_rank": None}),
    "qwen3-next": ("qwen3_next", {"rms_norm_eps": 1e-2}),
    "qwen3-next-wide-window": ("qwen3_next", {"rms_norm_eps": 1e-2, "linear_conv_kernel_dim": 7}),
}


@pytest.fixture(params=MODELS)
def decoder(request: pytest.FixtureRequest, backend: Any) -> Any:
    family, settings = MODELS[request.param]
    return decoder_of(tiny_hf_model(family, max_position_embeddings=320, **settings), backend)


def test_mixtures_packed_equal_separate(decoder: Any) -> None:
    sequences = tokens([7, 1, 65, 2, 130], seed=1)
    with torch.no_grad():
        together = decoder(**packed(sequences, [-1] * 5), recompute=False)
        alone = torch.cat([decoder(**packed([s], [-1]), recompute=False) for s in sequences])
    # The same sums in another order of matrix tiles.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=2e-5)


def test_mixtures_shared_prompts_equal_full_sequences(decoder: Any) -> None:
    segments, parents = shared_groups()
    shared_TC = decoder(**packed(segments, parents), recompute=False)
    weights = torch.randn(shared_TC.shape, generator=torch.Generator().manual_seed(2))
    of_segment = weights.split([len(segment) for segment in segments])
    sequences, prompts, own = apart(segments, parents)
    copies = {root: prompts.count(root) for root in prompts}
    full_TC = decoder(**packed(sequences, [-1] * len(sequences)), recompute=False)
    rows, full_weights = [], []
    for sequence_TC, root, segment in zip(
        full_TC.split([len(s) for s in sequences]), prompts, own, strict=True
    ):
        cut = 0 if segment == root else len(segments[root])
        rows.append((segment, sequence_TC[cut:]))
        head = [of_segment[root] / copies[root]] if cut else []
        full_weights.append(torch.cat([*head, of_segment[segment]]))
        if cut:
            rows.append((root, sequence_TC[:cut]))
    placed = dict(rows)
    wanted_TC = torch.cat([placed[index] for index in range(len(segments))])
    torch.testing.assert_close(shared_TC, wanted_TC, rtol=1e-4, atol=2e-5)
    ours = weighted(shared_TC, weights, decoder)
    theirs = weighted(full_TC, torch.cat(full_weights), decoder)
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        # float32 sums in another order; a prompt's gradient is one sum instead of several.
        error = float((ours[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * largest)
        assert error < 2e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deepseek", "qwen3-next", "qwen3-moe"])
def test_mixtures_recompute_bit_for_bit(name: str, dtype: torch.dtype, backend: Any) -> None:
    family, settings = MODELS[name]
    decoder = decoder_of(tiny_hf_model(family, max_position_embeddings=320, **settings), backend, dtype)
    segments, parents = shared_groups()
    found = []
    for recompute in (False, True):
        hidden_TC = decoder(**packed(segments, parents), recompute=recompute)
        weights = torch.randn(hidden_TC.shape, generator=torch.Generator().manual_seed(2))
        found.append((hidden_TC.detach(), weighted(hidden_TC, weights, decoder)))
    assert torch.isfinite(found[0][0]).all()
    assert torch.equal(found[0][0], found[1][0])
    for name_, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name_]), name_


def test_parents_that_are_all_roots_equal_none(decoder: Any) -> None:
    layout = packed(tokens([5, 9], seed=4), [-1, -1])
    with torch.no_grad():
        plain = decoder(**layout, recompute=False)
        given = decoder(**layout | {"parents": torch.tensor([-1, -1], dtype=torch.int32)}, recompute=False)
    torch.testing.assert_close(given, plain, rtol=1e-5, atol=1e-6)
