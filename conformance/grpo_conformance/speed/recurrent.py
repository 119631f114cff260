"""Work of the gated delta rule and of short convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .work import Load, Sizes, Tensors, Work, numbers, seeded, shared_out


def _delta_sizes(sizes: Sizes) -> tuple[int, int, int, int]:
    H = int(sizes["num_key_heads"])
    return H, H * int(sizes["num_value_groups"]), int(sizes["key_head_dim"]), int(sizes["value_head_dim"])


def _delta_tokens(sizes: Sizes, dtype: torch.dtype, T: int, seed: int) -> dict[str, Tensor]:
    H, K, D, E = _delta_sizes(sizes)
    return {
        "q": normalize(numbers(seeded(seed), T, H, D), dim=-1).to(dtype),
        "k": normalize(numbers(seeded(seed + 1), T, H, D), dim=-1).to(dtype),
        "v": numbers(seeded(seed + 2), T, K, E, dtype=dtype),
        "g": -numbers(seeded(seed + 3), T, K).abs() / 10,
        "beta": numbers(seeded(seed + 4), T, K).sigmoid(),
    }


def _delta_traffic(sizes: Sizes, dtype: torch.dtype, T: int) -> float:
    H, K, D, E = _delta_sizes(sizes)
    return float(dtype.itemsize * T * (2 * H * D + 2 * K * E) + 8 * T * K)


def delta_chunk(sizes: Sizes, dtype: torch.dtype) -> Work:
    """gated_delta.chunk from zero states: s T (2 H D + 2 K E) + 8 T K bytes for H key and K value heads (g
    and beta are float32); 7 T K D E FLOPs of the recurrence: decay, read, update, read."""
    _, K, D, E = _delta_sizes(sizes)
    lengths = shared_out(sizes["tokens"], sizes["sequences"])
    T = sum(lengths)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        bounds = ends.to(x["q"].device)
        return lambda: parts[-1](
            x["q"], x["k"], x["v"], x["g"], x["beta"], cu_seqlens=bounds, scale=D**-0.5,
            initial_state_SKDE=None, final_state=False,
        )  # fmt: skip

    return Work(
        tensors=lambda seed: _delta_tokens(sizes, dtype, T, seed), prepare=call,
        bytes=_delta_traffic(sizes, dtype, T), flops=7.0 * T * K * D * E,
        differentiable=("q", "k", "v", "g", "beta"),
    )  # fmt: skip


def delta_step(sizes: Sizes, dtype: torch.dtype) -> Work:
    """gated_delta.step: bytes of one token a sequence as gated_delta.chunk, and 8 B K D E of float32 states
    that are read and written; 7 B K D E FLOPs."""
    B = int(sizes["sequences"])
    _, K, D, E = _delta_sizes(sizes)

    def tensors(seed: int) -> dict[str, Tensor]:
        return {**_delta_tokens(sizes, dtype, B, seed), "state": numbers(seeded(seed + 5), B, K, D, E)}

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        slots = torch.arange(B, device=x["q"].device)
        return lambda: parts[-1](
            x["q"], x["k"], x["v"], x["g"], x["beta"], state_NKDE=x["state"], slots=slots, scale=D**-0.5
        )

    traffic = _delta_traffic(sizes, dtype, B) + 8.0 * B * K * D * E
    return Work(tensors=tensors, prepare=call, bytes=traffic, flops=7.0 * B * K * D * E)


def conv(sizes: Sizes, dtype: torch.dtype) -> Work:
    """short_conv.varlen from zeros: s (2 T C + C W) bytes for C channels and a width W; 2 T C W + 4 T C FLOPs
    (SiLU: exp, add, divide, product)."""
    lengths = shared_out(sizes["tokens"], sizes["sequences"])
    T, C, W = sum(lengths), int(sizes["channels"]), int(sizes["conv_kernel"])
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        bounds = ends.to(x["x"].device)
        return lambda: parts[-1](x["x"], x["w"], cu_seqlens=bounds, initial_state_SCW=None, final_state=False)

    return Work(
        tensors=lambda seed: {
            "x": numbers(seeded(seed), T, C, dtype=dtype),
            "w": numbers(seeded(seed + 1), C, W, dtype=dtype),
        },
        prepare=call,
        bytes=float(dtype.itemsize * (2 * T * C + C * W)),
        flops=2.0 * T * C * W + 4.0 * T * C,
        differentiable=("x", "w"),
    )


def conv_step(sizes: Sizes, dtype: torch.dtype) -> Work:
    """short_conv.step: s (2 B C + C W + 2 B C (W - 1)) bytes, windows read and written; 2 B C W + 4 B C
    FLOPs."""
    B, C, W = int(sizes["sequences"]), int(sizes["channels"]), int(sizes["conv_kernel"])

    def tensors(seed: int) -> dict[str, Tensor]:
        return {
            "x": numbers(seeded(seed), B, C, dtype=dtype),
            "w": numbers(seeded(seed + 1), C, W, dtype=dtype),
            "state": numbers(seeded(seed + 2), B, C, W - 1, dtype=dtype),
        }

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        slots = torch.arange(B, device=x["x"].device)
        return lambda: parts[-1](x["x"], x["w"], state_NCW=x["state"], slots=slots)

    return Work(
        tensors=tensors,
        prepare=call,
        bytes=float(dtype.itemsize * (2 * B * C + C * W + 2 * B * C * (W - 1))),
        flops=2.0 * B * C * W + 4.0 * B * C,
    )


DELTA = {"num_key_heads": 4, "num_value_groups": 2, "key_head_dim": 128, "value_head_dim": 128}
CONV = {"channels": 2048, "conv_kernel": 4}
LOADS = {
    "gated_delta.chunk": Load(
        sizes={"tokens": 1024, "sequences": 2, **DELTA}, quick={"tokens": 64},
        large={"tokens": 16384, "sequences": 4, "num_key_heads": 16}, make=delta_chunk,
    ),
    "gated_delta.step": Load(
        sizes={"sequences": 16, **DELTA}, quick={"sequences": 2},
        large={"sequences": 256, "num_key_heads": 16}, make=delta_step,
    ),
    "short_conv.varlen": Load(
        sizes={"tokens": 2048, "sequences": 4, **CONV}, quick={"tokens": 128},
        large={"tokens": 16384, "channels": 8192}, make=conv,
    ),
    "short_conv.step": Load(
        sizes={"sequences": 64, **CONV}, quick={"sequences": 4},
        large={"sequences": 256, "channels": 8192}, make=conv_step,
    ),
}  # fmt: skip
