"""How the parts of a mixture of experts are asked one token at a time and many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .alone import ROWS, Sequenced
from .facts import Facts
from .question import Tensors, normal

HOW: Mapping[str, Any] = {"norm": True, "scale": 2.5, "bias_X": None, "ids_Tk": None}


def _ids(facts: Facts, T: int, generator: torch.Generator) -> Tensor:
    X, k = int(facts["num_experts"]), int(facts["top_k"])
    return torch.rand(T, X, generator=generator).argsort(1)[:, :k]


def _order(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(places in ids, flat, in the order of rows; row of each place): by expert, then by token."""
    flat = ids.cpu().reshape(-1)
    rows = flat.argsort(stable=True)
    back = torch.empty_like(rows)
    back[rows] = torch.arange(len(rows))
    return rows.to(ids.device), back.to(ids.device)


def _route_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"logits": normal(generator, T, int(facts["num_experts"]), dtype=dtype, scale=2.0)}


def _how(facts: Facts) -> dict[str, Any]:
    groups = int(facts["num_groups"])
    return {**HOW, "top_k": int(facts["top_k"]), "score": facts["score"], "num_groups": groups,
            "topk_groups": groups}  # fmt: skip


def _route(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    found: tuple[Tensor, Tensor] = parts[-1](x["logits"], **_how(facts))
    return found


def _token_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    C = int(facts["hidden_size"])
    return {"x": normal(generator, T, C, dtype=dtype), "ids": _ids(facts, T, generator)}


def _dispatch(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    rows, _, _ = parts[-1](x["x"], x["ids"], num_experts=int(facts["num_experts"]), group=None)
    _, back = _order(x["ids"])
    return (rows[back].unflatten(0, x["ids"].shape),)


def _expert_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    C, k = int(facts["hidden_size"]), int(facts["top_k"])
    return {"rows": normal(generator, T, k, C, dtype=dtype), "ids": _ids(facts, T, generator)}


def _weights(facts: Facts, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    X, C, F = (int(facts[name]) for name in ("num_experts", "hidden_size", "intermediate_size"))
    return {
        "gate_up": normal(generator, X, 2 * F, C, dtype=dtype, scale=C**-0.5),
        "down": normal(generator, X, C, F, dtype=dtype, scale=F**-0.5),
    }


def _experts(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    order, back = _order(x["ids"])
    counts = torch.bincount(x["ids"].cpu().reshape(-1), minlength=int(facts["num_experts"]))
    rows = x["rows"].flatten(0, 1)[order]
    out = parts[-1](rows, x["gate_up"], x["down"], counts.to(rows.device))
    return (out[back].unflatten(0, x["ids"].shape),)


def _combine_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    k = int(facts["top_k"])
    return {**_expert_rows(facts, dtype, T, generator), "weights": torch.rand(T, k, generator=generator)}


def _combine(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    order, _ = _order(x["ids"])
    x_TC = torch.zeros_like(x["rows"][:, 0])
    _, _, record = parts[0](x_TC, x["ids"], num_experts=int(facts["num_experts"]), group=None)
    return (parts[-1](x["rows"].flatten(0, 1)[order], x["weights"], record),)


def _layer_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    wide = torch.float64 if facts["router_dtype"] == "float64" else torch.float32
    return {
        "x": normal(generator, T, int(facts["hidden_size"]), dtype=dtype),
        "logits": normal(generator, T, int(facts["num_experts"]), dtype=wide, scale=2.0),
    }


def _layer(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    found: tuple[Tensor, Tensor] = parts[-1](
        x["x"], x["logits"], x["gate_up"], x["down"], **_how(facts), group=None
    )
    return found


KINDS: Mapping[str, Sequenced] = {
    "moe.route": Sequenced(lengths=ROWS, rows=_route_rows, call=_route),
    "moe.dispatch": Sequenced(lengths=ROWS, rows=_token_rows, call=_dispatch),
    "moe.experts": Sequenced(lengths=ROWS, rows=_expert_rows, shared=_weights, call=_experts),
    "moe.combine": Sequenced(lengths=ROWS, rows=_combine_rows, call=_combine),
    "moe.layer": Sequenced(lengths=ROWS, rows=_layer_rows, shared=_weights, call=_layer),
}
