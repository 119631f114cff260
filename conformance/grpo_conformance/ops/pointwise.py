"""Questions to `norm.rms`, `rope.apply` and `mlp.swiglu`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import oracles
from .facts import Facts
from .family import Family
from .question import DTYPES, Question, Tensors, normal, seeded

EPS = 1e-5
NORM_AXES: Mapping[str, Sequence[Any]] = {"hidden_size": (64, 128, 256), "zero_centered": (False, True)}
ROPE_AXES: Mapping[str, Sequence[Any]] = {
    "rotary_dim": (32, 16, 64, 128),
    "head_dim": (32, 16, 64, 128),
    "interleaved": (False, True),
}
SWIGLU_AXES: Mapping[str, Sequence[Any]] = {"intermediate_size": (64, 128, 256)}
NORM_ENDS: Mapping[str, Any] = {"hidden size": (("hidden_size",), (8, 5000))}
ROPE_ENDS: Mapping[str, Any] = {"head dim": (("head_dim", "rotary_dim"), (2, 256))}
SWIGLU_ENDS: Mapping[str, Any] = {"intermediate size": (("intermediate_size",), (1, 5000))}
ROWS: Mapping[str, tuple[int, ...]] = {
    "one row": (1,), "three dimensions": (5, 3), "above 2^16 elements": (1100,), "no rows": (0,),
}  # fmt: skip


def norm_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """With and without a residual, zero-centred where that is offered."""
    C = int(facts["hidden_size"])
    rows = ROWS.get(shape, (9,))
    if shape == "above 2^16 elements":
        rows = (65536 // C + 3,)
    for residual in (False, True):
        question = _norm(shape, DTYPES[dtype], (*rows, C), residual, bool(facts["zero_centered"]))
        if shape == "rows with gaps":
            question = replace(question, padded=("x", "residual"))
        if shape == "isolation":
            question = _one_sick_row(question, ("x", "residual"), ("y", "total"))
        yield question


def _norm(label: str, dtype: torch.dtype, shape: tuple[int, ...], residual: bool, centred: bool) -> Question:
    generator = seeded(11)
    size = {"small values": 1e-3, "large values": 300.0}.get(label, 1.0)
    tensors = {
        "x": normal(generator, *shape, dtype=dtype, scale=size),
        "w": normal(generator, shape[-1], dtype=dtype),
    }
    if residual:
        tensors["residual"] = normal(generator, *shape, dtype=dtype, scale=size)

    def call(implementation: Any, given: Tensors) -> Any:
        return implementation(
            given["x"], given["w"], eps=EPS, residual=given.get("residual"), zero_centered=centred
        )

    def oracle(given: Tensors) -> Any:
        x, extra = given["x"], given.get("residual")
        y = oracles.rms_norm(x, given["w"], eps=EPS, residual=extra, zero_centered=centred)
        return y if extra is None else (y, x + extra)

    return Question(
        label=f"{label}, residual" if residual else label, tensors=tensors, call=call, oracle=oracle,
        dtype=dtype, names=("y", "total") if residual else ("y",), differentiable=tuple(tensors), seed=11,
    )  # fmt: skip


def rope_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Queries and keys of different numbers of heads; angles beyond a turn."""
    D, R = int(facts["head_dim"]), int(facts["rotary_dim"]) // 2
    T = {"one row": 1, "no rows": 0}.get(shape, 9)
    H = 65536 // (9 * D) + 1 if shape == "above 2^16 elements" else 4
    question = _rope(shape, DTYPES[dtype], (T, H, D), R, bool(facts["interleaved"]))
    if shape == "rows with gaps":
        question = replace(question, padded=("q", "k"))
    if shape == "isolation":
        question = _one_sick_row(question, ("q", "k"), ("q turned", "k turned"))
    yield question


def _rope(label: str, dtype: torch.dtype, shape: tuple[int, int, int], R: int, interleaved: bool) -> Question:
    generator = seeded(12)
    T, H, D = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.linspace(-9, 9, max(T * R, 1), dtype=torch.float64)[: T * R].view(T, R)
    tensors = {
        "q": normal(generator, T, H, D, dtype=dtype),
        "k": normal(generator, T, 2, D, dtype=dtype),
        "cos": angles.cos().to(wide),
        "sin": angles.sin().to(wide),
    }

    def call(implementation: Any, given: Tensors) -> Any:
        return implementation(given["q"], given["k"], given["cos"], given["sin"], interleaved=interleaved)

    def oracle(given: Tensors) -> tuple[Tensor, ...]:
        return tuple(
            oracles.turn(given[name], given["cos"], given["sin"], interleaved=interleaved) for name in "qk"
        )

    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=dtype, names=("q turned", "k turned"),
        differentiable=("q", "k"), seed=12,
    )  # fmt: skip


def swiglu_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Gates from far below zero to far above."""
    generator, F = seeded(13), int(facts["intermediate_size"])
    rows = (65536 // F + 3,) if shape == "above 2^16 elements" else ROWS.get(shape, (9,))
    size = {"small values": 0.02, "large values": 40.0}.get(shape, 3.0)
    question = Question(
        label=shape,
        tensors={"gate_up": normal(generator, *rows, 2 * F, dtype=DTYPES[dtype], scale=size)},
        call=lambda implementation, given: implementation(given["gate_up"]),
        oracle=lambda given: oracles.swiglu(given["gate_up"]),
        dtype=DTYPES[dtype],
        differentiable=("gate_up",),
        seed=13,
    )
    if shape == "rows with gaps":
        question = replace(question, padded=("gate_up",))
    if shape == "isolation":
        question = _one_sick_row(question, ("gate_up",), ("result",))
    yield question


QUICK = ("three dimensions", "above 2^16 elements", "isolation", "large values")


def _one_sick_row(question: Question, inputs: Sequence[str], results: Sequence[str]) -> Question:
    """NaN in row 4 of the inputs: the other rows, and their gradients, do not know."""
    given = [name for name in inputs if name in question.tensors]
    clean = torch.ones(question.tensors[given[0]].shape[0], dtype=torch.bool)
    clean[4] = False
    judged = [*results, *(f"gradient of {name}" for name in given)]
    return replace(question, poison=dict.fromkeys(given, 4), judged=dict.fromkeys(judged, clean))


COMMON: Mapping[str, Facts] = {**{name: {} for name in ROWS}, "rows with gaps": {}, "isolation": {}}
SIZES: Mapping[str, Facts] = {"small values": {}, "large values": {}}
PAIRED: Mapping[str, Facts] = {"interleaved": {"interleaved": True}, "part of the head": {"rotary_dim": 16}}
FAMILIES = {
    "norm.rms": Family(
        axes=NORM_AXES, shapes={**COMMON, **SIZES, "zero-centred": {"zero_centered": True}}, quick=QUICK,
        questions=norm_questions, ends=NORM_ENDS,
    ),
    "rope.apply": Family(
        axes=ROPE_AXES, shapes={**COMMON, **PAIRED}, quick=QUICK, questions=rope_questions, ends=ROPE_ENDS
    ),
    "mlp.swiglu": Family(
        axes=SWIGLU_AXES, shapes={**COMMON, **SIZES}, quick=QUICK, questions=swiglu_questions,
        ends=SWIGLU_ENDS,
    ),
}  # fmt: skip
