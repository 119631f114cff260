"""Questions to `gated_delta.*` and `short_conv.*`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .delta_oracles import conv, delta_rule
from .facts import Facts
from .family import Family
from .question import DTYPES, HOSTED, Question, Tensors, cumulative, hint, normal, seeded

SCALE = 0.3
LENGTHS: Mapping[str, list[int]] = {
    "length 1": [1],
    "ragged": [0, 3, 1, 9, 0, 5, 7, 0],
    "chunk boundaries": [64, 65],
    "one sequence of maximal length": [140],
    "no tokens": [0, 0],
}
WHOLE: Mapping[str, Facts] = {
    **{name: {} for name in LENGTHS}, "above 2^16 elements": {}, "isolation": {}, "rows with gaps": {},
    "zero start": {}, "output alone": {}, HOSTED: {},
}  # fmt: skip
DECAYS: Mapping[str, Facts] = {"no decay": {}, "strong decay": {}, "mixed decay": {}}
STEPS: Mapping[str, Facts] = {
    "one row": {},
    "scattered slots": {},
    "above 2^16 elements": {},
    "isolation": {},
}
QUICK = ("ragged", "above 2^16 elements", "isolation", "mixed decay", "scattered slots")
DELTA_AXES: Mapping[str, Sequence[Any]] = {
    "key_head_dim": (16, 32, 64, 128), "value_head_dim": (16, 32, 64, 128), "num_value_groups": (2, 1, 4),
}  # fmt: skip
DELTA_ENDS: Mapping[str, Any] = {
    "key head dim": (("key_head_dim",), (8, 128)),
    "value head dim": (("value_head_dim",), (8, 128)),
    "heads of a group": (("num_value_groups",), (1, 8)),
}
CONV_AXES: Mapping[str, Sequence[Any]] = {"conv_kernel": (4, 3, 2)}
CONV_ENDS: Mapping[str, Any] = {"kernel": (("conv_kernel",), (2, 8))}


def chunk_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Outputs, last states and gradients, from given states or from zero."""
    lengths = LENGTHS.get(shape, LENGTHS["ragged"])
    heads = 1
    if shape == "above 2^16 elements":
        lengths, heads = [20, 15], 65536 // (35 * facts["value_head_dim"] * facts["num_value_groups"]) + 1
    question = _chunk(shape, facts, DTYPES[dtype], lengths, heads)
    if shape == "rows with gaps":
        question = replace(question, padded=("q", "k", "v", "g", "beta"))
    if shape == "isolation":
        question = _one_sick(question, lengths, ("q", "k", "v", "g", "beta"), ("o", "last state"))
    yield question


def _five(given: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return given["q"], given["k"], given["v"], given["g"], given["beta"]


def _tokens(facts: Facts, dtype: torch.dtype, T: int, heads: int, label: str) -> dict[str, Tensor]:
    """q, k, v, g, beta of T tokens; g and beta in float32, or float64."""
    generator = seeded(21)
    D, E, K = facts["key_head_dim"], facts["value_head_dim"], heads * facts["num_value_groups"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = -torch.rand(T, K, generator=generator, dtype=torch.float64)
    if label == "mixed decay":
        g = 20 * g * (torch.rand(T, K, generator=generator) < 0.1)
    size = {"no decay": 0.0, "strong decay": 20.0, "mixed decay": 1.0}.get(label, 0.3)
    return {
        "q": normalize(normal(generator, T, heads, D, dtype=torch.float64), dim=-1).to(dtype),
        "k": normalize(normal(generator, T, heads, D, dtype=torch.float64), dim=-1).to(dtype),
        "v": normal(generator, T, K, E, dtype=dtype),
        "g": (size * g).to(wide),
        "beta": torch.rand(T, K, generator=generator, dtype=torch.float64).to(wide),
    }


def _chunk(label: str, facts: Facts, dtype: torch.dtype, lengths: list[int], heads: int) -> Question:
    tensors = _tokens(facts, dtype, sum(lengths), heads, label)
    D, E, K = facts["key_head_dim"], facts["value_head_dim"], heads * facts["num_value_groups"]
    differentiable = tuple(tensors)
    tensors["cu_seqlens"] = cumulative(lengths)
    if label != "zero start":
        tensors["state"] = normal(seeded(22), len(lengths), K, D, E, dtype=tensors["g"].dtype)
        differentiable = (*differentiable, "state")
    final = label != "output alone"

    def call(implementation: Any, given: Tensors) -> Any:
        o_TKE, last = implementation(
            *_five(given), cu_seqlens=given["cu_seqlens"],
            scale=SCALE, initial_state_SKDE=given.get("state"), final_state=final, **hint(label, lengths),
        )  # fmt: skip
        # A state that nobody asked for must not come: laid out as a result too many.
        return o_TKE, last

    def oracle(given: Tensors) -> Any:
        o_TKE, last = delta_rule(*_five(given), given.get("state"), lengths, SCALE)
        return (o_TKE, last) if final else o_TKE

    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=dtype, differentiable=differentiable,
        names=("o", "last state") if final else ("o",), seed=21,
        # The sum over all later tokens of what a decay forgets: of products over E and D, less others.
        magnitudes={"gradient of g": 4.0 * E**0.5},
    )  # fmt: skip


def delta_step_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Sequences in scattered slots; the states of other slots stay as they are."""
    B, heads = (1 if shape == "one row" else 5), 1
    if shape == "above 2^16 elements":
        B, heads = 9, 65536 // (9 * facts["value_head_dim"] * facts["num_value_groups"]) + 1
    tensors = _tokens(facts, DTYPES[dtype], B, heads, shape)
    D, E, K = facts["key_head_dim"], facts["value_head_dim"], heads * facts["num_value_groups"]
    tensors["state"] = normal(seeded(22), B + 3, K, D, E, dtype=tensors["g"].dtype)
    slots = torch.randperm(B + 3, generator=seeded(23))[:B]
    tensors["slots"] = slots

    def call(implementation: Any, given: Tensors) -> Any:
        return implementation(*_five(given), state_NKDE=given["state"], slots=given["slots"], scale=SCALE)

    def oracle(given: Tensors) -> tuple[Tensor, Tensor]:
        o_BKE, last = delta_rule(*_five(given), given["state"][slots], [1] * B, SCALE)
        return o_BKE, given["state"].index_copy(0, slots, last)

    question = Question(
        label=shape, tensors=tensors, call=call, oracle=oracle, dtype=DTYPES[dtype], names=("o", "states"),
        written=("state",), own_rounding=True, seed=21,
    )  # fmt: skip
    yield _one_sick_slot(question, ("q", "k", "v", "g", "beta")) if shape == "isolation" else question


def conv_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Outputs, last windows and gradients."""
    lengths = LENGTHS.get(shape, LENGTHS["ragged"])
    W, C, generator = facts["conv_kernel"], 12, seeded(24)
    if shape == "above 2^16 elements":
        C = 65536 // sum(lengths) + 1
    tensors = {
        "x": normal(generator, sum(lengths), C, dtype=DTYPES[dtype]),
        "w": normal(generator, C, W, dtype=DTYPES[dtype]),
        "cu_seqlens": cumulative(lengths),
    }
    if shape != "zero start":
        tensors["state"] = normal(generator, len(lengths), C, W - 1, dtype=DTYPES[dtype])
    final = shape != "output alone"

    def call(implementation: Any, given: Tensors) -> Any:
        return implementation(given["x"], given["w"], cu_seqlens=given["cu_seqlens"],
                              initial_state_SCW=given.get("state"), final_state=final,
                              **hint(shape, lengths))  # fmt: skip

    def oracle(given: Tensors) -> Any:
        y_TC, last = conv(given["x"], given["w"], given.get("state"), lengths)
        return (y_TC, last) if final else y_TC

    question = Question(
        label=shape, tensors=tensors, call=call, oracle=oracle, dtype=DTYPES[dtype],
        names=("y", "last inputs") if final else ("y",), seed=24,
        differentiable=tuple(name for name in ("x", "w", "state") if name in tensors),
    )  # fmt: skip
    if shape == "rows with gaps":
        question = replace(question, padded=("x",))
    if shape == "isolation":
        question = _one_sick(question, lengths, ("x",), ("y", "last inputs"))
    yield question


def conv_step_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """One token each, windows in scattered slots."""
    B, C, W, generator = (1 if shape == "one row" else 5), 12, facts["conv_kernel"], seeded(25)
    if shape == "above 2^16 elements":
        C = 65536 // B + 1
    slots = torch.randperm(B + 3, generator=seeded(23))[:B]
    tensors = {
        "x": normal(generator, B, C, dtype=DTYPES[dtype]),
        "w": normal(generator, C, W, dtype=DTYPES[dtype]),
        "state": normal(generator, B + 3, C, W - 1, dtype=DTYPES[dtype]),
        "slots": slots,
    }

    def call(implementation: Any, given: Tensors) -> Any:
        return implementation(given["x"], given["w"], state_NCW=given["state"], slots=given["slots"])

    def oracle(given: Tensors) -> tuple[Tensor, Tensor]:
        y_BC, last = conv(given["x"], given["w"], given["state"][slots], [1] * B)
        return y_BC, given["state"].index_copy(0, slots, last)

    question = Question(
        label=shape, tensors=tensors, call=call, oracle=oracle, dtype=DTYPES[dtype], names=("y", "states"),
        written=("state",), seed=25,
    )  # fmt: skip
    yield _one_sick_slot(question, ("x",)) if shape == "isolation" else question


def _one_sick(
    question: Question, lengths: Sequence[int], rows: Sequence[str], results: tuple[str, str]
) -> Question:
    """NaN in every token of one segment in the middle; the others' states start from their own."""
    sick = 3
    start = sum(lengths[:sick])
    tokens = torch.ones(sum(lengths), dtype=torch.bool)
    tokens[start : start + lengths[sick]] = False
    segments = torch.arange(len(lengths)) != sick
    judged = dict.fromkeys((results[0], *(f"gradient of {name}" for name in rows)), tokens)
    judged |= dict.fromkeys((results[1], "gradient of state"), segments)
    return replace(question, poison=dict.fromkeys(rows, ~tokens), judged=judged)


def _one_sick_slot(question: Question, rows: Sequence[str]) -> Question:
    """NaN in one sequence's token, and in a slot that nobody uses."""
    slots = question.tensors["slots"]
    clean_rows = torch.arange(len(slots)) != 1
    idle = next(n for n in range(len(question.tensors["state"])) if n not in slots.tolist())
    clean_slots = torch.ones(len(question.tensors["state"]), dtype=torch.bool)
    clean_slots[[int(slots[1]), idle]] = False
    return replace(
        question,
        poison={**dict.fromkeys(rows, 1), "state": idle},
        judged={question.names[0]: clean_rows, "states": clean_slots},
    )


FAMILIES = {
    "gated_delta.chunk": Family(
        axes=DELTA_AXES, shapes={**WHOLE, **DECAYS}, quick=QUICK, questions=chunk_questions, ends=DELTA_ENDS,
        since={HOSTED: 1},
    ),
    "gated_delta.step": Family(
        axes=DELTA_AXES, shapes={**STEPS, **DECAYS}, quick=QUICK, questions=delta_step_questions,
        ends=DELTA_ENDS,
    ),
    "short_conv.varlen": Family(
        axes=CONV_AXES, shapes=WHOLE, quick=QUICK, questions=conv_questions, ends=CONV_ENDS,
        since={HOSTED: 1},
    ),
    "short_conv.step": Family(
        axes=CONV_AXES, shapes=STEPS, quick=QUICK, questions=conv_step_questions, ends=CONV_ENDS
    ),
}  # fmt: skip
