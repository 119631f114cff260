"""The decoder against transformers' own models: logits, gradients, packing, shared prompts, recompute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import decoder_of, packed_hidden, packed_logits, random_sequences, tiny_hf_model

from grpo_core.errors import ConfigError
from grpo_core.model.transformer import Decoder

LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
SHORT = [1.0, 1.1, 1.5]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "short_factor": SHORT,
    "long_factor": [2.0, 3.0, 4.0], "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-three-heads-a-group": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases-everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 6}),
    "llama-head-dim-of-its-own": ("llama", {"head_dim": 14}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": DYNAMIC}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2-yarn-attention-factor": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.7}}),
    "qwen2-window-on-later-layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    ),
    "qwen2-window-by-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-with-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-one-kv-head": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
}  # fmt: skip
# float32 through three layers: both sides round differently about 100 times, 1e-4 is 800 ulp.
RELATIVE = 1e-4


def largest_relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, backend: Any) -> None:
    family, settings = MODELS[name]
    model = tiny_hf_model(family, **settings)
    sequences = random_sequences([13, 1, 22], 53)
    with torch.no_grad():
        theirs = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
        ours = packed_logits(decoder_of(model, backend), sequences)
    assert theirs.abs().max() > 0.5, "logits near zero would hide a difference"
    assert largest_relative(ours, theirs) < RELATIVE


@pytest.mark.parametrize(
    "name", ["llama-biases-everywhere", "qwen2-window-by-layer-types", "qwen3-tied-with-biases"]
)
def test_gradients_equal_transformers(name: str, backend: Any) -> None:
    family, settings = MODELS[name]
    model = tiny_hf_model(family, **settings)
    decoder = decoder_of(model, backend)
    sequences = random_sequences([9, 14], 53)
    weight = torch.randn(23, 53, generator=torch.Generator().manual_seed(1))
    (torch.cat([model(sequence[None]).logits[0] for sequence in sequences]) * weight).sum().backward()
    (packed_logits(decoder, sequences) * weight).sum().backward()
    family_map = _family_map(model)
    ours = dict(family_map.export({name: p.grad for name, p in decoder.named_parameters()}))
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        # A key bias shifts all scores of a query alike, so its true gradient is zero where there is no
        # rotary; the floor keeps parameters with tiny gradients from being compared with noise.
        scale = max(float(gradient.norm()), 1e-3)
        assert float((ours[parameter] - gradient).norm()) / scale < 1e-3, parameter


def _family_map(model: Any) -> Any:
    from tiny_models import FAMILIES

    family = FAMILIES[model.config.model_type]()
    return family.weights(family.arch(model.config.to_dict()))


@pytest.mark.parametrize("name", ["llama-three-heads-a-group", "qwen2-window-on-later-layers", "qwen3"])
def test_packed_ragged_sequences_equal_separate_ones(name: str, backend: Any) -> None:
    family, settings = MODELS[name]
    decoder = decoder_of(tiny_hf_model(family, **settings), backend)
    sequences = random_sequences([7, 1, 19, 2], 53)
    with torch.no_grad():
        together = packed_hidden(decoder, sequences)
        alone = torch.cat([packed_hidden(decoder, [sequence]) for sequence in sequences])
    # The same sums in another order of matrix tiles.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def shared_layout(prompts: list[torch.Tensor], groups: list[list[torch.Tensor]]) -> dict[str, Any]:
    """Each prompt once, then its completions, as `Batch` lays them out."""
    segments, positions, parents = [], [], []
    for prompt, completions in zip(prompts, groups, strict=True):
        parent = len(segments)
        segments.append(prompt)
        positions.append(torch.arange(len(prompt)))
        parents.append(-1)
        for completion in completions:
            segments.append(completion)
            positions.append(torch.arange(len(completion)) + len(prompt))
            parents.append(parent)
    lengths = [len(segment) for segment in segments]
    return {
        "tokens_T": torch.cat(segments),
        "positions_T": torch.cat(positions),
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "parents": torch.tensor(parents, dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


@pytest.mark.parametrize("name", ["llama-three-heads-a-group", "qwen2-window-on-later-layers", "qwen3"])
def test_shared_prompt_equals_full_sequences(name: str, backend: Any) -> None:
    family, settings = MODELS[name]
    decoder = decoder_of(tiny_hf_model(family, **settings), backend)
    prompts = random_sequences([8, 5], 53, seed=1)
    groups = [random_sequences([6, 1, 11], 53, seed=2), random_sequences([3, 4], 53, seed=3)]
    full = [torch.cat([p, c]) for p, group in zip(prompts, groups, strict=True) for c in group]
    lengths = [len(p) for p, group in zip(prompts, groups, strict=True) for _ in group]
    shared = decoder(**shared_layout(prompts, groups), recompute=False)
    apart = packed_hidden(decoder, full).split([len(sequence) for sequence in full])
    wanted, index = [], 0
    for prompt, group in zip(prompts, groups, strict=True):
        wanted.append(apart[index][: len(prompt)])
        for _ in group:
            wanted.append(apart[index][lengths[index] :])
            index += 1
    torch.testing.assert_close(shared, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def gradients(decoder: Decoder, recompute: bool) -> dict[str, torch.Tensor]:
    decoder.zero_grad()
    layout = shared_layout(random_sequences([8], 53, 1), [random_sequences([6, 9], 53, 2)])
    hidden = decoder(**layout, recompute=recompute)
    hidden.square().sum().backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_gives_the_same_gradients_bit_for_bit(dtype: torch.dtype, backend: Any) -> None:
    decoder = decoder_of(tiny_hf_model("qwen3"), backend, dtype)
    kept, recomputed = gradients(decoder, False), gradients(decoder, True)
    assert kept.keys() == recomputed.keys() == dict(decoder.named_parameters()).keys() - {"lm_head.weight"}
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_recompute_runs_each_layer_again_in_the_backward_pass(backend: Any) -> None:
    decoder = decoder_of(tiny_hf_model("llama"), backend)
    calls = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    packed_hidden(decoder, random_sequences([5], 53), recompute=True).sum().backward()
    assert len(calls) == 2 * len(decoder.layers)
    calls.clear()
    with torch.no_grad():
        packed_hidden(decoder, random_sequences([5], 53), recompute=True)
    assert len(calls) == len(decoder.layers)


def test_sequence_beyond_the_reach_of_dynamic_rope_is_refused(backend: Any) -> None:
    decoder = decoder_of(tiny_hf_model("llama", max_position_embeddings=16, rope_parameters=DYNAMIC), backend)
    packed_hidden(decoder, random_sequences([16], 53))
    with pytest.raises(ConfigError, match="17 tokens"):
        packed_hidden(decoder, random_sequences([17], 53))


def test_a_completion_counts_its_prompt_towards_the_limit_of_dynamic_rope(backend: Any) -> None:
    decoder = decoder_of(tiny_hf_model("llama", max_position_embeddings=16, rope_parameters=DYNAMIC), backend)
    layout = shared_layout(random_sequences([10], 53), [random_sequences([7], 53)])
    with pytest.raises(ConfigError, match="17 tokens"):
        decoder(**layout, recompute=False)


def test_init_weights_depends_on_the_seed_only(backend: Any) -> None:
    arch = decoder_of(tiny_hf_model("qwen2"), backend).arch
    first, second, other, half = (
        Decoder(arch, backend, device="cpu", dtype=dtype)
        for dtype in (torch.float32, torch.float32, torch.float32, torch.bfloat16)
    )
    for decoder, seed in ((first, 3), (second, 3), (other, 4), (half, 3)):
        decoder.init_weights(seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)
    assert torch.equal(first.embed.weight.bfloat16(), half.embed.weight)
    assert first.embed.weight.std().item() == pytest.approx(arch.initializer_range, rel=0.1)
    assert all(torch.isfinite(p).all() for p in first.parameters())


def test_tied_head_is_the_embedding_itself(backend: Any) -> None:
    tied = decoder_of(tiny_hf_model("llama", tie_word_embeddings=True), backend)
    assert tied.head_weight() is tied.embed.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    loose = decoder_of(tiny_hf_model("llama"), backend)
    assert loose.head_weight() is loose.lm_head.weight
