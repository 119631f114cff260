"""Questions to `sample.token`: the token whose step of the cumulative distribution holds u."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .facts import Facts
from .family import Family
from .question import DTYPES, Question, Tensors, normal, seeded

ROWS = 8
FILTERS: Mapping[str, dict[str, list[float]]] = {
    "plain": {},
    "temperatures": {"temperature": [0.2, 0.7, 1.0, 1.7, 5.0, 0.0, 1.0, 0.5]},
    "greedy": {"temperature": [0.0]},
    "top-k": {"top_k": [0, 1, 5, 20, 10**6, 3, 40, 2]},
    "top-p": {"top_p": [1.0, 0.05, 0.5, 0.8, 0.95, 0.3, 0.7, 0.99]},
    "min-p": {"min_p": [0.0, 0.05, 0.2, 0.5, 0.01, 0.1, 0.9, 0.02]},
    "all filters": {"top_k": [20, 0, 9], "top_p": [0.9, 0.5, 1.0], "min_p": [0.02, 0.0, 0.1],
                    "temperature": [1.0, 0.7, 0.0, 1.4]},
}  # fmt: skip
OTHERS = ("one token", "ties", "infinite and large logits", "above 2^16 elements", "one row", "ends of u")
QUICK = ("temperatures", "all filters", "ties", "infinite and large logits")
AXES: Mapping[str, Sequence[Any]] = {"vocab_size": (300, 1024, 32000)}
ENDS: Mapping[str, Any] = {"vocabulary": (("vocab_size",), (2, 5000))}


def distribution(
    logits_V: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Probabilities after the filters, by their definitions (Fan 2018, Holtzman 2020, Nguyen 2024)."""
    x = logits_V.double() / temperature
    p = torch.softmax(x, 0)
    if 0 < top_k < len(p):
        p = torch.where(x >= x.sort(descending=True).values[top_k - 1], p, 0.0)
        p = p / p.sum()
    if top_p < 1:
        likeliest = sorted(range(len(p)), key=lambda i: (-float(p[i]), i))
        mass, kept = 0.0, torch.zeros(len(p), dtype=torch.bool)
        for index in likeliest:
            if mass >= top_p and bool(kept.any()):
                break
            kept[index] = True
            mass += float(p[index])
        p = torch.where(kept, p, 0.0)
        p = p / p.sum()
    if min_p > 0:
        p = torch.where(p >= min_p * p.max(), p, 0.0)
        p = p / p.sum()
    return p


def questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """u in the middle of the steps of tokens that are drawn from the distribution itself."""
    V = 1 if shape == "one token" else int(facts["vocab_size"])
    rows = {"one row": 1, "above 2^16 elements": 65536 // V + 1}.get(shape, ROWS)
    logits = _logits(shape, rows, V, DTYPES[dtype])
    settings = _settings(FILTERS.get(shape, {}), rows)
    tensors: dict[str, Tensor] = {"logits": logits, "temperature": settings["temperature"]}
    tensors |= {name: settings[name] for name in ("top_k", "top_p", "min_p") if name in settings}
    drawn = [
        _draw(shape, row, logits[row], {name: float(x[row]) for name, x in settings.items()})
        for row in range(rows)
    ]
    u, ids, logprob, logprob1 = zip(*drawn, strict=True)
    tensors["u"] = torch.tensor(u, dtype=torch.float64)
    answers = (
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(logprob, dtype=torch.float64),
        torch.tensor(logprob1, dtype=torch.float64),
    )
    # A log-prob is a difference of tempered logits, which float32 rounds by their size.
    largest = float(
        logits.double().nan_to_num(neginf=0.0).abs().max() / settings["temperature"].clamp_min(0.2).min()
    )

    def call(implementation: Any, given: Tensors) -> Any:
        return implementation(
            given["logits"], given["u"], temperature_B=given["temperature"], top_k_B=given.get("top_k"),
            top_p_B=given.get("top_p"), min_p_B=given.get("min_p"),
        )  # fmt: skip

    yield Question(
        label=shape, tensors=tensors, call=call, oracle=lambda given: answers, dtype=torch.float32,
        names=("ids", "log-probs", "log-probs at temperature 1"), seed=51,
        magnitudes=dict.fromkeys(("log-probs", "log-probs at temperature 1"), max(largest, 4.0)),
    )  # fmt: skip


def _logits(shape: str, rows: int, V: int, dtype: torch.dtype) -> Tensor:
    logits = normal(seeded(51), rows, V, dtype=torch.float64, scale=2.0)
    if shape == "ties":
        logits = logits.round()
    if shape.startswith("infinite"):
        logits[:, ::3] = -torch.inf
        logits[1] *= 50
        logits[2] += 1e4
        logits[3, 1:] = -torch.inf
        logits[3, 0] = -3.0
    return logits.to(dtype)


def _settings(chosen: Mapping[str, Sequence[float]], rows: int) -> dict[str, Tensor]:
    """Of each row, repeated as often as needed; temperature 1 where nothing is said."""
    given = {"temperature": [1.0], **chosen}
    repeated = {name: [values[row % len(values)] for row in range(rows)] for name, values in given.items()}
    return {
        name: torch.tensor(values, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, values in repeated.items()
    }


def _draw(
    shape: str, row: int, logits_V: Tensor, how: Mapping[str, float]
) -> tuple[float, int, float, float]:
    """(u, token, its log-prob, its log-prob under temperature 1)."""
    plain = torch.log_softmax(logits_V.double(), 0)
    if how["temperature"] == 0:
        top = int((logits_V == logits_V.max()).nonzero()[0])
        return 0.3, top, 0.0, float(plain[top])
    p = distribution(
        logits_V, how["temperature"], int(how.get("top_k", 0)), how.get("top_p", 1.0), how.get("min_p", 0.0)
    )
    steps = p.cumsum(0)
    possible = (p > 0).nonzero()[:, 0]
    if shape == "ends of u":
        token = int(possible[0] if row % 2 == 0 else possible[-1])
        u = 0.0 if row % 2 == 0 else 1 - 2.0**-53
    else:
        # A step that float32 weights cannot miss: a token of some probability.
        likely = (p >= min(1e-3, float(p.max()))).nonzero()[:, 0]
        token = int(likely[(7 * row + 3) % len(likely)])
        u = float(steps[token] - p[token] / 2)
    return u, token, math.log(float(p[token])), float(plain[token])


FAMILIES = {
    "sample.token": Family(
        axes=AXES,
        shapes={name: {} for name in (*FILTERS, *OTHERS)},
        quick=QUICK,
        questions=questions,
        ends=ENDS,
    )
}
