"""Work of attention over packed sequences: plain, with shared prompts, and latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .work import Load, Sizes, Tensors, Work, numbers, seeded, seen, shared_out


def heads(sizes: Sizes) -> tuple[int, int, int, int]:
    """H, K, D, E."""
    K = int(sizes["num_key_value_heads"])
    return K * int(sizes["num_key_value_groups"]), K, int(sizes["head_dim"]), int(sizes["v_head_dim"])


def window_of(sizes: Sizes) -> int | None:
    """The window that is called with: True stands for half of what there is to see."""
    return max(1, int(sizes["tokens"]) // int(sizes["sequences"]) // 2) if sizes["window"] else None


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _projected(sizes: Sizes, dtype: torch.dtype, T: int) -> Callable[[int], dict[str, Tensor]]:
    H, K, D, E = heads(sizes)
    return lambda seed: {
        "q": numbers(seeded(seed), T, H, D, dtype=dtype),
        "k": numbers(seeded(seed + 1), T, K, D, dtype=dtype),
        "v": numbers(seeded(seed + 2), T, K, E, dtype=dtype),
    }


def traffic(sizes: Sizes, dtype: torch.dtype, queries: int, keys: int) -> float:
    """s (Q H (D + E) + S K (D + E)): queries and results, keys and values."""
    H, K, D, E = heads(sizes)
    return float(dtype.itemsize * (queries * H + keys * K) * (D + E))


def varlen(sizes: Sizes, dtype: torch.dtype) -> Work:
    """attention.varlen, causal: s T (H + K) (D + E) bytes; 2 H (D + E) FLOPs for each pair of a query and a
    key that it sees. The softmax is not counted."""
    lengths = shared_out(sizes["tokens"], sizes["sequences"])
    H, _, D, E = heads(sizes)
    window = window_of(sizes)
    pairs = sum(seen(0, length, window) for length in lengths)
    bounds = _bounds(lengths)

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        ends = bounds.to(x["q"].device)
        return lambda: parts[-1](
            x["q"], x["k"], x["v"], cu_seqlens=ends, max_seqlen=max(lengths), scale=D**-0.5, causal=True,
            window=window,
        )  # fmt: skip

    T = sum(lengths)
    return Work(
        tensors=_projected(sizes, dtype, T), prepare=call, bytes=traffic(sizes, dtype, T, T),
        flops=2.0 * H * (D + E) * pairs, differentiable=("q", "k", "v"),
    )  # fmt: skip


def shared_prefix(sizes: Sizes, dtype: torch.dtype) -> Work:
    """attention.shared_prefix: formulas of attention.varlen, a completion's query sees its whole prompt.
    `sequences` prompts, each a quarter of its tokens, have `samples` completions each."""
    lengths: list[int] = []
    parents: list[int] = []
    pairs, window = 0.0, window_of(sizes)
    for tokens in shared_out(sizes["tokens"], sizes["sequences"]):
        prompt, root = max(tokens // 4, 1), len(lengths)
        answers = shared_out(tokens - prompt, sizes["samples"])
        lengths += [prompt, *answers]
        parents += [-1, *[root] * len(answers)]
        pairs += seen(0, prompt, window) + sum(seen(prompt, answer, window) for answer in answers)
    H, _, D, E = heads(sizes)
    ends, tree = _bounds(lengths), torch.tensor(parents, dtype=torch.int32)

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        device = x["q"].device
        given = {"cu_seqlens": ends.to(device), "parents": tree.to(device)}
        return lambda: parts[-1](
            x["q"], x["k"], x["v"], **given, max_seqlen=max(lengths), scale=D**-0.5, window=window
        )

    T = sum(lengths)
    return Work(
        tensors=_projected(sizes, dtype, T), prepare=call, bytes=traffic(sizes, dtype, T, T),
        flops=2.0 * H * (D + E) * pairs, differentiable=("q", "k", "v"),
    )  # fmt: skip


def latent_sizes(sizes: Sizes) -> tuple[int, int, int, int, int]:
    """H, N, R, E, L."""
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    H, N, R, E, L = (int(sizes[name]) for name in names)
    return H, N, R, E, L


def latent_tensors(sizes: Sizes, dtype: torch.dtype, T: int, seed: int) -> dict[str, Tensor]:
    """Queries and latents of T tokens, and both weights as rows of one."""
    H, N, R, E, L = latent_sizes(sizes)
    return {
        "q_nope": numbers(seeded(seed), T, H, N, dtype=dtype),
        "q_rope": numbers(seeded(seed + 1), T, H, R, dtype=dtype),
        "latent": numbers(seeded(seed + 2), T, L, dtype=dtype),
        "k_rope": numbers(seeded(seed + 3), T, R, dtype=dtype),
        "weight": numbers(seeded(seed + 4), H, N + E, L, dtype=dtype, scale=L**-0.5),
    }


def mla_varlen(sizes: Sizes, dtype: torch.dtype) -> Work:
    """mla.varlen: s (T (H (N + R + E) + L + R) + H (N + E) L) bytes; 2 T H (N + E) L FLOPs to expand keys
    and values and 2 H (N + R + E) for each pair. Heads of N + R numbers (R with rotary), latents of L."""
    lengths = shared_out(sizes["tokens"], sizes["sequences"])
    H, N, R, E, L = latent_sizes(sizes)
    T, ends = sum(lengths), _bounds(lengths)

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        bounds = ends.to(x["weight"].device)

        def run() -> Any:
            w_uk, w_uv = torch.split(x["weight"], [N, E], 1)
            return parts[-1](
                x["q_nope"], x["q_rope"], x["latent"], x["k_rope"], w_uk, w_uv, cu_seqlens=bounds,
                parents=None, max_seqlen=max(lengths), scale=(N + R) ** -0.5,
            )  # fmt: skip

        return run

    return Work(
        tensors=lambda seed: latent_tensors(sizes, dtype, T, seed),
        prepare=call,
        bytes=dtype.itemsize * (T * (H * (N + R + E) + L + R) + H * (N + E) * L),
        flops=2.0 * T * H * (N + E) * L + 2.0 * H * (N + R + E) * sum(seen(0, length) for length in lengths),
        differentiable=("q_nope", "q_rope", "latent", "k_rope", "weight"),
    )


HEADS = {"num_key_value_heads": 4, "num_key_value_groups": 2, "head_dim": 128, "v_head_dim": 128,
         "window": False}  # fmt: skip
LATENTS = {"num_attention_heads": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
           "kv_lora_rank": 512}  # fmt: skip
WIDE = {"num_key_value_heads": 8, "num_key_value_groups": 4}
MANY = {"num_attention_heads": 64}
LOADS = {
    "attention.varlen": Load(
        sizes={"tokens": 2048, "sequences": 4, **HEADS}, quick={"tokens": 256},
        large={"tokens": 32768, "sequences": 8, **WIDE}, make=varlen,
    ),
    "attention.shared_prefix": Load(
        sizes={"tokens": 2048, "sequences": 2, "samples": 4, **HEADS}, quick={"tokens": 256},
        large={"tokens": 32768, "sequences": 4, "samples": 8, **WIDE}, make=shared_prefix,
    ),
    "mla.varlen": Load(
        sizes={"tokens": 1024, "sequences": 2, "shared_prefix": False, **LATENTS}, quick={"tokens": 128},
        large={"tokens": 16384, "sequences": 4, **MANY}, make=mla_varlen,
    ),
}  # fmt: skip
