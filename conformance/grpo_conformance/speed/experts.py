"""Work of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .work import Load, Sizes, Tensors, Work, numbers, seeded


def _sizes(sizes: Sizes) -> tuple[int, int, int, int, int]:
    """T, X, k, C, F."""
    names = ("tokens", "num_experts", "top_k", "hidden_size", "intermediate_size")
    T, X, k, C, F = (int(sizes[name]) for name in names)
    return T, X, k, C, F


def _router(sizes: Sizes) -> torch.dtype:
    return torch.float64 if sizes["router_dtype"] == "float64" else torch.float32


def _how(sizes: Sizes) -> dict[str, Any]:
    return {"top_k": int(sizes["top_k"]), "score": sizes["score"], "bias_X": None,
            "num_groups": int(sizes["num_groups"]), "topk_groups": int(sizes["num_groups"]), "norm": True,
            "scale": 1.0, "ids_Tk": None}  # fmt: skip


def _ids(T: int, X: int, k: int, seed: int) -> Tensor:
    """Every token's experts, each expert as often as the others."""
    start = torch.randint(X, (T, 1), generator=seeded(seed))
    return (start + torch.arange(k) * max(X // k, 1)) % X


def route(sizes: Sizes, dtype: torch.dtype) -> Work:
    """moe.route: r T X + (r + 8) T k bytes for logits of r bytes; 4 T X FLOPs of the scores. Selection is not
    counted."""
    T, X, k, _, _ = _sizes(sizes)
    # Here the dtype of the case is the router's.
    return Work(
        tensors=lambda seed: {"logits": numbers(seeded(seed), T, X, dtype=dtype, scale=2.0)},
        prepare=lambda parts, x: lambda: parts[-1](x["logits"], **_how(sizes)),
        bytes=float(dtype.itemsize * (T * X + T * k) + 8 * T * k),
        flops=4.0 * T * X,
        differentiable=("logits",),
    )


def dispatch(sizes: Sizes, dtype: torch.dtype) -> Work:
    """moe.dispatch on one rank: s T C (1 + k) + 8 T k + 8 X bytes; no FLOPs."""
    T, X, k, C, _ = _sizes(sizes)

    def tensors(seed: int) -> dict[str, Tensor]:
        return {"x": numbers(seeded(seed), T, C, dtype=dtype), "ids": _ids(T, X, k, seed)}

    return Work(
        tensors=tensors,
        prepare=lambda parts, x: lambda: parts[-1](x["x"], x["ids"], num_experts=X, group=None)[:2],
        bytes=float(dtype.itemsize * T * C * (1 + k) + 8 * T * k + 8 * X),
        flops=0.0,
        differentiable=("x",),
    )


def experts(sizes: Sizes, dtype: torch.dtype) -> Work:
    """moe.experts: s (2 T k C + 3 X F C) + 8 X bytes, the weights of all experts read; 6 T k C F + 5 T k F
    FLOPs."""
    T, X, k, C, F = _sizes(sizes)

    def tensors(seed: int) -> dict[str, Tensor]:
        base, rest = divmod(T * k, X)
        return {
            "rows": numbers(seeded(seed), T * k, C, dtype=dtype),
            "gate_up": numbers(seeded(seed + 1), X, 2 * F, C, dtype=dtype, scale=C**-0.5),
            "down": numbers(seeded(seed + 2), X, C, F, dtype=dtype, scale=F**-0.5),
            "counts": torch.tensor([base + (x < rest) for x in range(X)]),
        }

    return Work(
        tensors=tensors,
        prepare=lambda parts, x: lambda: parts[-1](x["rows"], x["gate_up"], x["down"], x["counts"]),
        bytes=float(dtype.itemsize * (2 * T * k * C + 3 * X * F * C) + 8 * X),
        flops=6.0 * T * k * C * F + 5.0 * T * k * F,
        differentiable=("rows", "gate_up", "down"),
    )


def combine(sizes: Sizes, dtype: torch.dtype) -> Work:
    """moe.combine: s T C (k + 1) + r T k bytes for weights of r bytes; 2 T k C FLOPs. The dispatch before it
    is not timed."""
    T, X, k, C, _ = _sizes(sizes)
    wide = _router(sizes)

    def tensors(seed: int) -> dict[str, Tensor]:
        return {
            "rows": numbers(seeded(seed), T * k, C, dtype=dtype),
            "weights": numbers(seeded(seed + 1), T, k, dtype=wide).abs(),
            "ids": _ids(T, X, k, seed),
        }

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        x_TC = torch.zeros(T, C, dtype=dtype, device=x["rows"].device)
        _, _, record = parts[0](x_TC, x["ids"], num_experts=X, group=None)
        return lambda: parts[-1](x["rows"], x["weights"], record)

    return Work(
        tensors=tensors, prepare=call, differentiable=("rows", "weights"),
        bytes=float(dtype.itemsize * T * C * (k + 1) + wide.itemsize * T * k), flops=2.0 * T * k * C,
    )  # fmt: skip


def layer(sizes: Sizes, dtype: torch.dtype) -> Work:
    """moe.layer: s (2 T C + 3 X F C) + r T X + 8 T k bytes; FLOPs of route, experts and combine."""
    T, X, k, C, F = _sizes(sizes)
    wide = _router(sizes)

    def tensors(seed: int) -> dict[str, Tensor]:
        return {
            "x": numbers(seeded(seed), T, C, dtype=dtype),
            "logits": numbers(seeded(seed + 1), T, X, dtype=wide, scale=2.0),
            "gate_up": numbers(seeded(seed + 2), X, 2 * F, C, dtype=dtype, scale=C**-0.5),
            "down": numbers(seeded(seed + 3), X, C, F, dtype=dtype, scale=F**-0.5),
        }

    return Work(
        tensors=tensors,
        prepare=lambda parts, x: lambda: parts[-1](*x.values(), **_how(sizes), group=None),
        bytes=float(dtype.itemsize * (2 * T * C + 3 * X * F * C) + wide.itemsize * T * X + 8 * T * k),
        flops=4.0 * T * X + 6.0 * T * k * C * F + 5.0 * T * k * F + 2.0 * T * k * C,
        differentiable=("x", "logits", "gate_up", "down"),
    )


MIXTURE = {
    "tokens": 512, "num_experts": 16, "top_k": 4, "hidden_size": 1024, "intermediate_size": 384,
    "score": "softmax", "num_groups": 1, "router_dtype": "float32", "expert_parallel": 1,
}  # fmt: skip
_QUICK = {"tokens": 64, "hidden_size": 256, "intermediate_size": 128}
_LARGE = {"tokens": 8192, "num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}
MAKERS = {"route": route, "dispatch": dispatch, "experts": experts, "combine": combine, "layer": layer}
LOADS = {
    f"moe.{part}": Load(
        sizes={**MIXTURE, **({"dtype": "bfloat16"} if part == "route" else {})}, quick=_QUICK, large=_LARGE,
        make=make,
    )
    for part, make in MAKERS.items()
}  # fmt: skip
