"""Questions to `attention.varlen` and `attention.shared_prefix`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import oracles
from .facts import Facts
from .family import Family
from .question import DTYPES, HOSTED, Question, Tensors, cumulative, hint, normal, seeded

AXES: Mapping[str, Sequence[Any]] = {
    "head_dim": (32, 16, 64, 128),
    "v_head_dim": (32, 16, 64, 128),
    "num_key_value_groups": (2, 1, 4, 8),
    "window": (False, True),
}
ENDS: Mapping[str, tuple[tuple[str, ...], tuple[int, int]]] = {
    "head dim": (("head_dim", "v_head_dim"), (8, 256)),
    "heads of a group": (("num_key_value_groups",), (1, 8)),
}
LENGTHS: Mapping[str, tuple[list[int], list[int]]] = {
    "length 1": ([1], [-1]),
    "ragged": ([5, 0, 1, 7, 9, 30, 3], [-1] * 7),
    "one sequence of maximal length": ([160], [-1]),
    "above 2^16 elements": ([257, 90], [-1, -1]),
    "no tokens": ([0, 0], [-1, -1]),
    "families": ([6, 4, 5, 9, 2, 7, 3, 12, 1], [-1, 0, 0, -1, 3, 3, 3, 3, 0]),
    "empty child and empty prompt": ([4, 3, 0, 0, 5], [-1, 0, 0, -1, 3]),
    "long beside short": ([40, 3, 90, 1], [-1, 0, 0, 0]),
    "all alike": ([600], [-1]),
}
USUAL: Mapping[str, Facts] = {
    "length 1": {}, "ragged": {}, "above 2^16 elements": {}, "large scores": {}, "rows with gaps": {},
    "isolation": {}, "windows": {"window": True}, "wider values": {"v_head_dim": 64}, "all alike": {},
    HOSTED: {},
}  # fmt: skip
PLAIN: Mapping[str, Facts] = {
    **USUAL, "one sequence of maximal length": {}, "no tokens": {}, "not causal": {},
}  # fmt: skip
TREES: Mapping[str, Facts] = {
    **USUAL, "families": {}, "empty child and empty prompt": {}, "long beside short": {},
}  # fmt: skip
QUICK = ("ragged", "families", "above 2^16 elements", "windows", "isolation", "all alike", HOSTED)
COMMON = 96.0
"""Of all scores of "all alike": weights that are rounded before it is taken off are off by a quarter of it in
bfloat16, and sums of values that are all near `VALUES` stand still when they are kept in bfloat16."""
VALUES = 2.0


def questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Every question that a named shape stands for."""
    usual = "ragged" if op == "attention.varlen" else "families"
    lengths, parents = LENGTHS.get(shape, LENGTHS[usual])
    if op == "attention.varlen":
        parents = [-1] * len(lengths)
    heads = 2 if shape != "above 2^16 elements" else max(2, 65536 // (sum(lengths) * facts["v_head_dim"]) + 1)
    size = 6.0 if shape == "large scores" else 1.0
    question = _question(op, shape, facts, DTYPES[dtype], lengths, parents, heads, size, causal=True)
    if shape == "rows with gaps":
        yield replace(question, padded=("q", "k", "v"))
    elif shape == "isolation":
        yield _poisoned(question, lengths, parents)
    elif shape == "all alike":
        yield _alike(question)
    elif shape == "not causal":
        yield _question(op, shape, facts, DTYPES[dtype], lengths, parents, heads, size, causal=False)
    elif shape == "windows":
        for window in (1, 4, 64):
            yield _question(op, f"window {window}", facts, DTYPES[dtype], lengths, parents, heads, size,
                            causal=True, window=window)  # fmt: skip
    else:
        yield question


def _question(
    op: str, label: str, facts: Facts, dtype: torch.dtype, lengths: list[int], parents: list[int],
    kv_heads: int, size: float, *, causal: bool, window: int | None = None,
) -> Question:  # fmt: skip
    generator = seeded(3)
    T, D, E = sum(lengths), int(facts["head_dim"]), int(facts["v_head_dim"])
    H = kv_heads * int(facts["num_key_value_groups"])
    tensors = {
        "q": normal(generator, T, H, D, dtype=dtype, scale=size),
        "k": normal(generator, T, kv_heads, D, dtype=dtype),
        "v": normal(generator, T, kv_heads, E, dtype=dtype),
        "cu_seqlens": cumulative(lengths),
    }
    rest: dict[str, Any] = {"scale": D**-0.5, "window": window}
    if op == "attention.varlen":
        rest["causal"] = causal
    else:
        tensors["parents"] = torch.tensor(parents, dtype=torch.int32)
    longest = max(lengths)
    # A query that sees one key has gradients of zero: sums of E products less themselves, times the keys.
    terms = 0.25 * float(tensors["v"].double().abs().sum(-1).max()) * D**-0.5 if T else 0.0
    alone = longest == 1 or window == 1
    largest = {name: float(tensors[name].double().abs().max()) * terms if alone else 0.0 for name in "qk"}

    def call(implementation: Any, given: Tensors) -> Tensor:
        named = {name: given[name] for name in given if name not in ("q", "k", "v")}
        o_THE: Tensor = implementation(
            given["q"], given["k"], given["v"], max_seqlen=longest, **named, **rest,
            **hint(label, lengths, parents if "parents" in given else None),
        )  # fmt: skip
        return o_THE

    def oracle(given: Tensors) -> Tensor:
        return oracles.attention(given["q"], given["k"], given["v"], lengths=lengths, parents=parents,
                                 scale=D**-0.5, causal=causal, window=window)  # fmt: skip

    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=dtype, names=("o",),
        differentiable=("q", "k", "v"), seed=3,
        magnitudes={"gradient of q": largest["k"], "gradient of k": largest["q"]},
    )  # fmt: skip


def _alike(question: Question) -> Question:
    """Scores and values with a large part in common. Gradients are differences of what it multiplies."""
    tensors = dict(question.tensors)
    # Without the keys' own share of it, weights are nearly equal and sums have many terms.
    tensors["k"] = tensors["k"].double() - tensors["k"].double().mean(-1, keepdim=True)
    each = (COMMON * tensors["q"].shape[2] ** -0.5) ** 0.5
    for name, common in (("q", each), ("k", each), ("v", VALUES)):
        tensors[name] = (tensors[name].double() + common).to(question.tensors[name].dtype)
    return replace(question, tensors=tensors, differentiable=(), magnitudes={})


def _poisoned(question: Question, lengths: Sequence[int], parents: Sequence[int]) -> Question:
    """NaN in one sequence without children, and in the last of all tokens' neighbours."""
    sick = next(i for i in range(len(lengths) - 2, 0, -1) if lengths[i] and i not in parents)
    start = sum(lengths[:sick])
    rows = slice(start, start + lengths[sick])
    clean = torch.ones(sum(lengths), dtype=torch.bool)
    clean[rows] = False
    inputs = ("q", "k", "v")
    seen = clean.clone()
    if parents[sick] >= 0:
        # Gradients of the prompt see every completion.
        first = sum(lengths[: parents[sick]])
        seen[first : first + lengths[parents[sick]]] = False
    return replace(
        question,
        poison=dict.fromkeys(inputs, rows),
        judged={"o": clean, **{f"gradient of {name}": seen for name in inputs}},
    )


FAMILIES = {
    op: Family(axes=AXES, shapes=shapes, quick=QUICK, questions=questions, ends=ENDS, since={HOSTED: 1})
    for op, shapes in (("attention.varlen", PLAIN), ("attention.shared_prefix", TREES))
}
