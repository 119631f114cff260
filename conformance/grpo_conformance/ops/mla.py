"""Questions to `mla.varlen`: latent attention over packed segments, alone or with parents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import oracles
from .attention import LENGTHS
from .facts import Facts
from .family import Family
from .question import DTYPES, HOSTED, Question, Tensors, cumulative, hint, normal, seeded

SIZES: Mapping[str, Sequence[Any]] = {
    "qk_nope_head_dim": (16, 32, 64, 128),
    "qk_rope_head_dim": (16, 32, 64),
    "v_head_dim": (32, 16, 64, 128),
    "kv_lora_rank": (32, 64, 128, 512),
    "num_attention_heads": (3, 4, 8, 16),
}
AXES: Mapping[str, Sequence[Any]] = {**SIZES, "shared_prefix": (False, True)}
ENDS: Mapping[str, tuple[tuple[str, ...], tuple[int, int]]] = {
    "value head dim": (("v_head_dim",), (8, 128)),
    "latent rank": (("kv_lora_rank",), (8, 128)),
    "heads": (("num_attention_heads",), (1, 6)),
}
TOKENS = ("q_nope", "q_rope", "latent", "k_rope")
SHAPES: Mapping[str, Facts] = {
    "length 1": {}, "ragged": {}, "one sequence of maximal length": {}, "above 2^16 elements": {},
    "no tokens": {}, "large scores": {}, "rows with gaps": {}, "isolation": {},
    HOSTED: {"shared_prefix": True},
    "families": {"shared_prefix": True}, "empty child and empty prompt": {"shared_prefix": True},
    "long beside short": {"shared_prefix": True},
}  # fmt: skip
QUICK = ("ragged", "families", "isolation", HOSTED)


def expand(rows: Tensor, w_uk_HNL: Tensor, w_uv_HEL: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of rows [latent | rotary key], head by head in float64."""
    latent = w_uk_HNL.shape[2]
    c, turned = rows[:, :latent].double(), rows[:, latent:].double()
    keys = [torch.cat([c @ w.double().T, turned], 1) for w in w_uk_HNL]
    return torch.stack(keys, 1), torch.stack([c @ w.double().T for w in w_uv_HEL], 1)


def weights(facts: Facts, dtype: torch.dtype) -> Tensor:
    """[H, N + E, L], of which w_uk and w_uv are views, as in a decoder."""
    heads, rank = int(facts["num_attention_heads"]), int(facts["kv_lora_rank"])
    rows = int(facts["qk_nope_head_dim"]) + int(facts["v_head_dim"])
    return normal(seeded(62), heads, rows, rank, dtype=dtype, scale=rank**-0.5)


def questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Outputs, and the gradients of queries, latents, rotary keys and both weights."""
    lengths, parents = LENGTHS.get(shape, LENGTHS["families" if shape == HOSTED else "ragged"])
    question = _question(
        shape, facts, DTYPES[dtype], lengths, parents, 6.0 if shape == "large scores" else 1.0
    )
    if shape == "rows with gaps":
        question = replace(question, padded=TOKENS)
    if shape == "isolation":
        sick = slice(sum(lengths[:4]), sum(lengths[:5]))
        clean = torch.ones(sum(lengths), dtype=torch.bool)
        clean[sick] = False
        judged = dict.fromkeys(("o", *(f"gradient of {name}" for name in TOKENS)), clean)
        question = replace(question, poison=dict.fromkeys(TOKENS, sick), judged=judged)
    yield question


def _question(
    label: str, facts: Facts, dtype: torch.dtype, lengths: list[int], parents: list[int], size: float
) -> Question:
    nope, rope = int(facts["qk_nope_head_dim"]), int(facts["qk_rope_head_dim"])
    T, heads, generator = sum(lengths), int(facts["num_attention_heads"]), seeded(61)
    if label == "above 2^16 elements":
        facts = {**facts, "num_attention_heads": max(heads, 65536 // (T * int(facts["v_head_dim"])) + 1)}
        heads = facts["num_attention_heads"]
    tensors = {
        "q_nope": normal(generator, T, heads, nope, dtype=dtype, scale=size),
        "q_rope": normal(generator, T, heads, rope, dtype=dtype, scale=size),
        "latent": normal(generator, T, int(facts["kv_lora_rank"]), dtype=dtype),
        "k_rope": normal(generator, T, rope, dtype=dtype),
        "weight": weights(facts, dtype),
        "cu_seqlens": cumulative(lengths),
    }
    tensors |= {"parents": torch.tensor(parents, dtype=torch.int32)} if facts["shared_prefix"] else {}
    scale = (nope + rope) ** -0.5
    # With one key each, gradients of scores are zero: sums of E products less themselves.
    size_of_terms = 0.25 * int(facts["v_head_dim"]) * scale if max(lengths) == 1 else 0.0

    def call(implementation: Any, given: Tensors) -> Any:
        w_uk, w_uv = torch.split(given["weight"], [nope, given["weight"].shape[1] - nope], 1)
        return implementation(
            *(given[name] for name in TOKENS), w_uk, w_uv, cu_seqlens=given["cu_seqlens"],
            parents=given.get("parents"), max_seqlen=max(lengths), scale=scale,
            **hint(label, lengths, parents if "parents" in given else None),
        )  # fmt: skip

    def oracle(given: Tensors) -> Tensor:
        w_uk, w_uv = given["weight"][:, :nope], given["weight"][:, nope:]
        keys, values = expand(torch.cat([given["latent"], given["k_rope"]], 1), w_uk, w_uv)
        return oracles.attention(
            torch.cat([given["q_nope"], given["q_rope"]], -1), keys, values, lengths=lengths,
            parents=parents, scale=scale, causal=True, window=None,
        )  # fmt: skip

    differentiable = (*TOKENS, "weight")
    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=dtype, names=("o",), seed=61,
        differentiable=differentiable,
        magnitudes={f"gradient of {name}": size_of_terms * 4 for name in differentiable},
    )  # fmt: skip


FAMILIES = {
    "mla.varlen": Family(
        axes=AXES, shapes=SHAPES, quick=QUICK, questions=questions, ends=ENDS, since={HOSTED: 1}
    ),
}
