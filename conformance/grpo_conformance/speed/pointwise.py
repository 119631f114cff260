"""Work of norms, rotary, SwiGLU, linears, log-probs, sampling and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .work import Load, Sizes, Tensors, Work, numbers, seeded


def norm(sizes: Sizes, dtype: torch.dtype) -> Work:
    """norm.rms: s (2 T C + C) bytes; 4 T C FLOPs (square, sum, scale, weight)."""
    T, C, s = sizes["tokens"], sizes["hidden_size"], dtype.itemsize

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        centred = bool(sizes["zero_centered"])
        return lambda: parts[-1](x["x"], x["w"], eps=1e-6, residual=None, zero_centered=centred)

    return Work(
        tensors=lambda seed: {
            "x": numbers(seeded(seed), T, C, dtype=dtype),
            "w": numbers(seeded(seed + 1), C, dtype=dtype),
        },
        prepare=call,
        bytes=s * (2 * T * C + C),
        flops=4 * T * C,
        differentiable=("x", "w"),
    )


def rope(sizes: Sizes, dtype: torch.dtype) -> Work:
    """rope.apply: 2 s T (H + K) D + 4 T R bytes (R the rotary dims; cos and sin are float32 [T, R / 2]);
    3 T (H + K) R FLOPs."""
    T, K, D, R = (sizes[name] for name in ("tokens", "num_key_value_heads", "head_dim", "rotary_dim"))
    H = K * sizes["num_key_value_groups"]

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        angles = torch.arange(T).float()[:, None] / 1000 ** torch.linspace(0, 1, R // 2)
        return {
            "q": numbers(seeded(seed), T, H, D, dtype=dtype),
            "k": numbers(seeded(seed + 1), T, K, D, dtype=dtype),
            "cos": angles.cos(),
            "sin": angles.sin(),
        }

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        turned = bool(sizes["interleaved"])
        return lambda: parts[-1](x["q"], x["k"], x["cos"], x["sin"], interleaved=turned)

    return Work(
        tensors=tensors, prepare=call, bytes=2 * dtype.itemsize * T * (H + K) * D + 4 * T * R,
        flops=3 * T * (H + K) * R, differentiable=("q", "k"),
    )  # fmt: skip


def swiglu(sizes: Sizes, dtype: torch.dtype) -> Work:
    """mlp.swiglu: 3 s T F bytes; 5 T F FLOPs (exp, add, divide, two products)."""
    T, F = sizes["tokens"], sizes["intermediate_size"]
    return Work(
        tensors=lambda seed: {"gate_up": numbers(seeded(seed), T, 2 * F, dtype=dtype)},
        prepare=lambda parts, x: lambda: parts[-1](x["gate_up"]),
        bytes=3 * dtype.itemsize * T * F,
        flops=5 * T * F,
        differentiable=("gate_up",),
    )


def _linear(sizes: Sizes, dtype: torch.dtype, prepare: Any, differentiable: tuple[str, ...]) -> Work:
    T, K, N = sizes["tokens"], sizes["in_features"], sizes["out_features"]
    return Work(
        tensors=lambda seed: {
            "x": numbers(seeded(seed), T, K, dtype=dtype),
            "weight": numbers(seeded(seed + 1), N, K, dtype=dtype, scale=K**-0.5),
        },
        prepare=prepare,
        bytes=dtype.itemsize * (T * K + N * K + T * N),
        flops=2 * T * K * N,
        differentiable=differentiable,
    )


def dense(sizes: Sizes, dtype: torch.dtype) -> Work:
    """linear.dense: s (T I + O I + T O) bytes; 2 T I O FLOPs, for I inputs and O outputs."""

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        return lambda: parts[-1](x["x"], x["weight"], None, main_grad_NK=None)

    return _linear(sizes, dtype, call, ("x", "weight"))


def packed(sizes: Sizes, dtype: torch.dtype) -> Work:
    """linear.packed: as linear.dense; the layer is made before the clock starts."""

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        layer = parts[-1](x["weight"], None)
        return lambda: layer(x["x"])

    return _linear(sizes, dtype, call, ())


def logprob(sizes: Sizes, dtype: torch.dtype) -> Work:
    """loss.logprob: s (T C + V C) + 16 T bytes (int64 labels, two float32 results); 2 T C V + 5 T V FLOPs
    (exp, two sums, the entropy's product, the largest logit)."""
    T, C, V = sizes["tokens"], sizes["hidden_size"], sizes["vocab_size"]

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        return {
            "hidden": numbers(seeded(seed), T, C, dtype=dtype),
            "head": numbers(seeded(seed + 1), V, C, dtype=dtype, scale=2 * C**-0.5),
            "labels": torch.randint(V, (T,), generator=seeded(seed + 2)),
        }

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        return lambda: parts[-1](x["hidden"], x["head"], x["labels"], temperature=1.0, group=None)

    return Work(
        tensors=tensors, prepare=call, bytes=dtype.itemsize * (T * C + V * C) + 16 * T,
        flops=2 * T * C * V + 5 * T * V, differentiable=("hidden", "head"),
    )  # fmt: skip


def sample(sizes: Sizes, dtype: torch.dtype) -> Work:
    """sample.token without filters: s B V + 28 B bytes (float64 draws, float32 temperatures, int64 ids, two
    float32 log-probs); 4 B V FLOPs (temper, exp, sum, running sum). On a device without float64 draws are
    float32, which changes nothing that counts."""
    B, V = sizes["sequences"], sizes["vocab_size"]

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        return {
            "logits": numbers(seeded(seed), B, V, dtype=dtype, scale=2.0),
            "u": torch.rand(B, generator=seeded(seed + 1), dtype=torch.float64),
            "temperature": torch.ones(B),
        }

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        return lambda: parts[-1](
            x["logits"], x["u"], temperature_B=x["temperature"], top_k_B=None, top_p_B=None, min_p_B=None
        )

    return Work(tensors=tensors, prepare=call, bytes=dtype.itemsize * B * V + 28 * B, flops=4 * B * V)


def adamw(sizes: Sizes, dtype: torch.dtype) -> Work:
    """optim.adamw with bfloat16 copies: 30 N bytes (4 float32 tensors read, 3 written, the copy written);
    14 N FLOPs (decay, both moments, root, quotient, update) for N parameters."""
    N, count = sizes["parameters"], sizes["tensors"]
    many = range(count)
    each = N // count
    names = ("param", "grad", "exp_avg", "exp_avg_sq")

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        drawn = {f"{n} {i}": numbers(seeded(seed + j), each) for j, n in enumerate(names) for i in many}
        drawn |= {f"exp_avg_sq {i}": drawn[f"exp_avg_sq {i}"].square() for i in many}
        return drawn | {f"copy {i}": torch.zeros(each, dtype=torch.bfloat16) for i in many}

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        listed = [[x[f"{name} {i}"] for i in many] for name in names]
        copies = [x[f"copy {i}"] for i in many]
        decays = [0.1] * count
        return lambda: parts[-1](
            *listed, step=10, lr=1e-6, beta1=0.9, beta2=0.95, eps=1e-8, weight_decays=decays,
            grad_scale=1.0, copies=copies,
        )  # fmt: skip

    return Work(tensors=tensors, prepare=call, bytes=30 * each * count, flops=14 * each * count)


LINEAR = Load(
    sizes={"tokens": 512, "in_features": 1024, "out_features": 3072},
    quick={"tokens": 64}, large={"tokens": 8192, "in_features": 4096, "out_features": 12288}, make=dense,
)  # fmt: skip
LOADS = {
    "norm.rms": Load(
        sizes={"tokens": 4096, "hidden_size": 1024, "zero_centered": False}, make=norm,
        quick={"tokens": 256}, large={"tokens": 16384, "hidden_size": 4096},
    ),
    "rope.apply": Load(
        sizes={"tokens": 2048, "num_key_value_heads": 4, "num_key_value_groups": 2, "head_dim": 128,
               "rotary_dim": 128, "interleaved": False},
        quick={"tokens": 256}, large={"tokens": 16384, "num_key_value_heads": 8, "num_key_value_groups": 4},
        make=rope,
    ),
    "mlp.swiglu": Load(
        sizes={"tokens": 2048, "intermediate_size": 3072}, make=swiglu,
        quick={"tokens": 128}, large={"tokens": 16384, "intermediate_size": 12288},
    ),
    "linear.dense": LINEAR,
    "linear.packed": Load(
        sizes={**LINEAR.sizes, "tokens": 32}, quick={"tokens": 8}, large={**LINEAR.large, "tokens": 64},
        make=packed,
    ),
    "loss.logprob": Load(
        sizes={"tokens": 128, "hidden_size": 1024, "vocab_size": 32000}, make=logprob,
        quick={"tokens": 16, "vocab_size": 8192},
        large={"tokens": 4096, "hidden_size": 4096, "vocab_size": 128000},
    ),
    "sample.token": Load(
        sizes={"sequences": 16, "vocab_size": 32000}, make=sample, quick={"sequences": 4},
        large={"sequences": 256, "vocab_size": 128000},
    ),
    "optim.adamw": Load(
        sizes={"parameters": 1 << 22, "tensors": 16}, make=adamw, quick={"parameters": 1 << 18},
        large={"parameters": 1 << 28},
    ),
}  # fmt: skip
