"""Questions to `moe.*`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference import moe as reference

from . import moe_oracles
from .facts import Facts
from .family import Family
from .question import DTYPES, Question, Tensors, normal, seeded

AXES: Mapping[str, Sequence[Any]] = {
    "dtype": ("float32", "bfloat16"),
    "router_dtype": ("float32", "float64"),
    "num_experts": (12, 8, 16, 64),
    "top_k": (3, 2, 4, 8, 1),
    "score": ("sigmoid", "softmax"),
    "num_groups": (1,),
    "hidden_size": (64, 128, 256),
    "intermediate_size": (32, 64, 128),
    "expert_parallel": (1,),
}
SIZED_AXES = {name: tried for name, tried in AXES.items() if name != "dtype"}
ROUTED_AXES = {name: tried for name, tried in AXES.items() if name != "router_dtype"}
SIZE_ENDS: Mapping[str, Any] = {
    "hidden size": (("hidden_size",), (8, 320)), "intermediate size": (("intermediate_size",), (8, 320)),
}  # fmt: skip
EXPERT_ENDS: Mapping[str, Any] = {"experts": (("num_experts",), (8, 160))}
ROUTE_SHAPES: Mapping[str, Facts] = {
    "one token": {}, "no tokens": {}, "many tokens": {}, "softmax": {"score": "softmax"},
    "groups": {"num_groups": 4}, "groups of one": {"num_groups": 12}, "all experts": {"top_k": 12},
    "ties": {}, "ties of softmax": {"score": "softmax"}, "ties of groups": {"num_groups": 4},
    "infinite and large logits": {}, "infinite and large logits to softmax": {"score": "softmax"},
    "bias is no weight": {}, "replay": {}, "replay of int16": {}, "above 2^16 elements": {},
}  # fmt: skip
COUNTS: Mapping[str, list[int]] = {
    "uneven": [3, 0, 1, 7, 0, 2],
    "all tokens to one expert": [0, 0, 13, 0, 0, 0],
    "experts without tokens": [1, 0, 0, 0, 0, 2],
    "one row": [0, 1, 0, 0, 0, 0],
    "no rows": [0] * 6,
    "more rows than a block": [70, 1, 33, 16, 17, 130],
    "above 2^16 elements": [0, 900, 3, 0, 200, 1],
}
IDS: Mapping[str, tuple[int, int]] = {
    "usual": (7, 3), "one expert a token": (9, 1), "one token": (1, 2), "no tokens": (0, 2),
    "all tokens to one expert": (8, 1), "tokens to all experts": (4, 12), "above 2^16 elements": (1500, 2),
    "isolation": (7, 2),
}  # fmt: skip
QUICK = ("ties", "replay", "groups", "infinite and large logits", "uneven", "all tokens to one expert",
         "usual", "isolation", "above 2^16 elements")  # fmt: skip


def route_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Ids exactly, weights and the gradient of the logits; normalised and not."""
    X, top_k, groups = (int(facts[name]) for name in ("num_experts", "top_k", "num_groups"))
    # The least number of experts comes with the usual top-k.
    top_k = min(top_k, X)
    logits, ids = _logits(shape, X, DTYPES[dtype]), None
    if shape.startswith("replay"):
        ids = torch.rand(len(logits), X, generator=seeded(33)).argsort(1)[:, :top_k]
        ids[1::3] = -1
        ids = ids.to(torch.int16 if shape == "replay of int16" else torch.int64)
    bias = None
    if shape == "bias is no weight" or (groups > 1 and not shape.startswith("ties")):
        bias = 2 * normal(seeded(34), X)
    topk_groups = min(groups, max(groups // 2, -(-top_k * groups // X)))
    for norm in (True, False):
        yield _route(
            f"{shape}, {'normalised' if norm else 'as scored'}", logits, bias, ids,
            top_k=top_k, score=facts["score"], num_groups=groups, topk_groups=topk_groups, norm=norm,
            scale=2.5,
        )  # fmt: skip


def _logits(shape: str, X: int, dtype: torch.dtype) -> Tensor:
    T = {"one token": 1, "no tokens": 0, "many tokens": 90}.get(shape, 7)
    if shape == "above 2^16 elements":
        T = 65536 // X + 1
    logits = normal(seeded(31), T, X, dtype=torch.float64, scale=2.0)
    if shape.startswith("ties"):
        return (logits.round() / 2).to(dtype)
    if shape == "above 2^16 elements":
        # Sixteenths: scores are equal or far apart, however they are rounded.
        return ((16 * logits).round() / 16).clamp(-6, 6).to(dtype)
    if shape.startswith("infinite"):
        logits[0, 1::2] = -torch.inf
        logits[1] = 1e4 * logits[1].sign()
        logits[2, :] = -torch.inf
        logits[2, X // 2] = 0.0
        logits[3] = 4 * logits[3]
    return logits.to(dtype)


def _route(label: str, logits: Tensor, bias: Tensor | None, ids: Tensor | None, **rest: Any) -> Question:
    tensors = {"logits": logits}
    tensors |= {} if bias is None else {"bias": bias}
    tensors |= {} if ids is None else {"ids": ids}

    def arguments(given: Tensors) -> dict[str, Any]:
        return {**rest, "bias_X": given.get("bias"), "ids_Tk": given.get("ids")}

    def call(implementation: Any, given: Tensors) -> Any:
        return implementation(given["logits"], **arguments(given))

    def oracle(given: Tensors) -> Any:
        return moe_oracles.route(given["logits"], **arguments(given))

    # Gradients of normalised weights are differences of terms up to the scale.
    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=logits.dtype, names=("weights", "ids"),
        differentiable=("logits",), magnitudes={"gradient of logits": float(rest["scale"])}, seed=31,
    )  # fmt: skip


def _ids(shape: str, X: int, usual_k: int) -> Tensor:
    T, k = IDS.get(shape, (7, usual_k))
    if shape == "all tokens to one expert":
        return torch.full((T, 1), X // 2)
    return torch.rand(T, X, generator=seeded(32)).argsort(1)[:, : min(k, X)]


def dispatch_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Rows sorted by expert, tokens in order; the gradient of x is the sum of a token's rows."""
    X, C = int(facts["num_experts"]), int(facts["hidden_size"])
    ids = _ids(shape, X, int(facts["top_k"]))
    tensors = {"x": normal(seeded(35), len(ids), C, dtype=DTYPES[dtype]), "ids": ids}
    pairs = sorted((expert, token) for token, row in enumerate(ids.tolist()) for expert in row)
    tokens = torch.tensor([token for _, token in pairs], dtype=torch.int64)
    counts = torch.tensor([sum(1 for expert, _ in pairs if expert == x) for x in range(X)])
    yield Question(
        label=shape,
        tensors=tensors,
        call=lambda implementation, given: implementation(
            given["x"], given["ids"], num_experts=X, group=None
        )[:2],
        oracle=lambda given: (given["x"][tokens], counts),
        dtype=DTYPES[dtype],
        names=("rows", "counts"),
        differentiable=("x",),
        seed=35,
        **_sick_token(shape, "x", len(ids), {"rows": tokens != 3}),
    )


def combine_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Rows of the same offer's dispatch, changed on the way, back to their tokens."""
    X, C = int(facts["num_experts"]), int(facts["hidden_size"])
    ids = _ids(shape, X, int(facts["top_k"]))
    T, k = ids.shape
    wide = torch.float64 if dtype == "float64" else torch.float32
    generator = seeded(36)
    tensors = {
        "rows": normal(generator, T * k, C, dtype=DTYPES[dtype]),
        "weights": normal(generator, T, k, dtype=wide),
        "ids": ids,
    }
    order = sorted(
        (int(expert), token, place) for token, row in enumerate(ids) for place, expert in enumerate(row)
    )
    row_of = torch.zeros(T, k, dtype=torch.int64)
    for row, (_, token, place) in enumerate(order):
        row_of[token, place] = row

    def call(parts: Any, given: Tensors) -> Tensor:
        dispatch, combine = parts
        x_TC = torch.zeros(T, C, dtype=given["rows"].dtype, device=given["rows"].device)
        _, _, record = dispatch(x_TC, given["ids"], num_experts=X, group=None)
        y_TC: Tensor = combine(given["rows"], given["weights"], record)
        return y_TC

    def oracle(given: Tensors) -> Tensor:
        return (given["rows"][row_of] * given["weights"][..., None]).sum(1)

    yield Question(
        label=shape, tensors=tensors, call=call, oracle=oracle, dtype=DTYPES[dtype], names=("y",),
        differentiable=("rows", "weights"), own_rounding=True, seed=36,
        reference=(reference.dispatch, reference.combine),
        magnitudes={"y": float(k) ** 0.5, "gradient of weights": 0.3 * C**0.5},
    )  # fmt: skip


def experts_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """Counts of six experts; gradients of rows and both weights."""
    counts = COUNTS.get(shape, COUNTS["uneven"])
    C, F, generator = int(facts["hidden_size"]), int(facts["intermediate_size"]), seeded(37)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tensors = {
        "rows": normal(generator, sum(counts), C, dtype=DTYPES[dtype]),
        "gate_up": normal(generator, len(counts), 2 * F, C, dtype=DTYPES[dtype], scale=C**-0.5),
        "down": normal(generator, len(counts), C, F, dtype=DTYPES[dtype], scale=F**-0.5),
        "counts": torch.tensor(counts),
    }
    if shape == "main gradients":
        yield _main_gradients(shape, tensors, owners, DTYPES[dtype])
        return
    yield Question(
        label=shape,
        tensors=tensors,
        call=lambda implementation, given: implementation(*(given[name] for name in tensors)),
        oracle=lambda given: moe_oracles.experts(given["rows"], owners, given["gate_up"], given["down"]),
        dtype=DTYPES[dtype],
        names=("rows out",),
        differentiable=("rows", "gate_up", "down"),
        seed=37,
        **_sick_token(shape, "rows", len(owners), {"rows out": torch.arange(len(owners)) != 3}),
    )


def _main_gradients(label: str, inputs: Tensors, owners: Tensor, dtype: torch.dtype) -> Question:
    """Gradients of both weights added to float32 tensors; experts without rows leave theirs alone."""
    leaves = ("rows", "gate_up", "down")
    tensors = dict(inputs)
    for place, name in enumerate(leaves[1:]):
        tensors[f"main {name}"] = normal(seeded(48 + place), *inputs[name].shape)
    tensors["g_y"] = normal(seeded(50), *inputs["rows"].shape, dtype=dtype)

    def call(implementation: Any, given: Tensors) -> Any:
        rows, gate_up, down = (given[name].detach().requires_grad_() for name in leaves)
        with torch.enable_grad():
            y = implementation(
                rows, gate_up, down, given["counts"], main_grad_gate_up_XGC=given["main gate_up"],
                main_grad_down_XCF=given["main down"],
            )  # fmt: skip
            y.backward(given["g_y"])
        rest = (torch.zeros_like(x) if x.grad is None else x.grad for x in (gate_up, down))
        return y, rows.grad, *rest

    def oracle(given: Tensors) -> Any:
        wide = [given[name].detach().requires_grad_() for name in leaves]
        with torch.enable_grad():
            y = moe_oracles.experts(wide[0], owners, *wide[1:])
        g_rows, g_gate_up, g_down = torch.autograd.grad(y, wide, given["g_y"])
        nothing = (0 * given[name] for name in leaves[1:])
        mains = (given["main gate_up"] + g_gate_up, given["main down"] + g_down)
        return y.detach(), g_rows, *nothing, *mains

    mains = ("main gradient of gate_up", "main gradient of down")
    return Question(
        label=label, tensors=tensors, call=call, oracle=oracle, dtype=dtype, seed=37,
        own_rounding=dtype == torch.float64, magnitudes=dict.fromkeys(mains, float(len(owners)) ** 0.5),
        names=("rows out", "gradient of rows", *(f"gradient of {name} for autograd" for name in leaves[1:]),
               *mains),
        written=("main gate_up", "main down"),
    )  # fmt: skip


def layer_questions(op: str, shape: str, facts: Facts, dtype: str) -> Iterable[Question]:
    """All four at once; the reference is the four of core in a row."""
    X, C, F = (int(facts[name]) for name in ("num_experts", "hidden_size", "intermediate_size"))
    T, generator = IDS.get(shape, (7, 3))[0], seeded(38)
    wide = torch.float64 if facts["router_dtype"] == "float64" or dtype == "float64" else torch.float32
    tensors = {
        "x": normal(generator, T, C, dtype=DTYPES[dtype]),
        "logits": normal(generator, T, X, dtype=wide, scale=2.0),
        "gate_up": normal(generator, X, 2 * F, C, dtype=DTYPES[dtype], scale=C**-0.5),
        "down": normal(generator, X, C, F, dtype=DTYPES[dtype], scale=F**-0.5),
    }
    if shape == "all tokens to one expert":
        tensors["logits"][:, X // 2] += 20
    how: dict[str, Any] = {
        "top_k": int(facts["top_k"]), "score": facts["score"], "bias_X": None, "num_groups": 1,
        "topk_groups": 1, "norm": True, "scale": 2.5, "ids_Tk": None,
    }  # fmt: skip

    def oracle(given: Tensors) -> Any:
        weights, ids = moe_oracles.route(given["logits"], **how)
        return moe_oracles.layer(given["x"], ids, weights, given["gate_up"], given["down"]), ids

    yield Question(
        label=shape,
        tensors=tensors,
        call=lambda implementation, given: implementation(
            *(given[name] for name in tensors), **how, group=None
        ),
        oracle=oracle,
        dtype=DTYPES[dtype],
        names=("y", "ids"),
        differentiable=tuple(tensors),
        reference=four_parts,
        seed=38,
    )


def four_parts(
    x_TC: Tensor, logits_TX: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, *, group: Any, **how: Any
) -> tuple[Tensor, Tensor]:
    """`moe.layer` from core's references."""
    weights_Tk, ids_Tk = reference.route(logits_TX, **how)
    rows_RC, counts_X, record = reference.dispatch(x_TC, ids_Tk, num_experts=logits_TX.shape[1], group=group)
    rows_RC = reference.experts(rows_RC, gate_up_XGC, down_XCF, counts_X)
    return reference.combine(rows_RC, weights_Tk, record), ids_Tk


def _sick_token(shape: str, name: str, rows: int, judged: Mapping[str, Tensor]) -> dict[str, Any]:
    """NaN in row 3 of an input, where the shape is about isolation."""
    if shape != "isolation":
        return {}
    return {"poison": {name: 3}, "judged": {**judged, f"gradient of {name}": torch.arange(rows) != 3}}


LAYERS: Mapping[str, Facts] = {
    name: {} for name in ("usual", "one token", "no tokens", "all tokens to one expert")
}
FAMILIES = {
    "moe.route": Family(
        axes=ROUTED_AXES, shapes=ROUTE_SHAPES, quick=QUICK, questions=route_questions, ends=EXPERT_ENDS,
        dtypes=("float32", "float64"), dtype_fact="router_dtype",
    ),
    "moe.dispatch": Family(
        axes=SIZED_AXES, shapes={name: {} for name in IDS}, quick=QUICK, questions=dispatch_questions,
        ends=EXPERT_ENDS,
    ),
    "moe.experts": Family(
        axes=SIZED_AXES, shapes={**{name: {} for name in COUNTS}, "isolation": {}, "main gradients": {}},
        quick=(*QUICK, "main gradients"), questions=experts_questions, ends=SIZE_ENDS,
        trained=("main gradients",), since={"main gradients": 1},
    ),
    "moe.combine": Family(
        axes=SIZED_AXES, shapes={name: {} for name in IDS if name != "isolation"}, quick=QUICK,
        questions=combine_questions, ends=EXPERT_ENDS, partner="moe.dispatch",
    ),
    "moe.layer": Family(
        axes=SIZED_AXES, shapes=LAYERS, quick=QUICK, questions=layer_questions, ends=SIZE_ENDS
    ),
}  # fmt: skip
