"""Work of token caches and of attention over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.common import Common

from .attention import (
    HEADS,
    LATENTS,
    MANY,
    WIDE,
    heads,
    latent_sizes,
    latent_tensors,
    traffic,
)
from .work import Load, Sizes, Tensors, Work, numbers, seeded, seen, shared_out


def _spec(sizes: Sizes, dtype: torch.dtype, device: torch.device, tokens: int) -> CacheSpec:
    if "kv_lora_rank" in sizes:
        _, _, R, _, L = latent_sizes(sizes)
        K, D, E = 1, L + R, L
    else:
        _, K, D, E = heads(sizes)
    return CacheSpec(
        num_layers=1, num_key_value_heads=K, head_dim=D, v_head_dim=E, dtype=dtype, device=device,
        max_slots=int(sizes["sequences"]) + 1, max_tokens=tokens,
    )  # fmt: skip


def _rows(sizes: Sizes, dtype: torch.dtype, T: int, seed: int) -> tuple[Tensor, Tensor]:
    if "kv_lora_rank" in sizes:
        _, _, R, _, L = latent_sizes(sizes)
        return numbers(seeded(seed), T, L, dtype=dtype), numbers(seeded(seed + 1), T, R, dtype=dtype)
    _, K, D, E = heads(sizes)
    return numbers(seeded(seed), T, K, D, dtype=dtype), numbers(seeded(seed + 1), T, K, E, dtype=dtype)


def filled(
    kind: Any, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> tuple[Any, dict[str, Tensor]]:
    """A cache whose sequences hold `context` tokens each, with their slots and lengths."""
    B, S = int(sizes["sequences"]), int(sizes["context"])
    cache = kind(_spec(sizes, dtype, device, B * (S + 1)))
    slots = [cache.allocate(S) for _ in range(B)]
    if None in slots:
        raise ValueError(f"a cache of {B * (S + 1)} tokens has no room for {B} sequences of {S}")
    first, second = _rows(sizes, dtype, S, 5)
    for slot in slots:
        cache.layers[0].write(
            first.to(device), second.to(device), slots_T=torch.full((S,), slot, device=device),
            positions_T=torch.arange(S, device=device),
        )  # fmt: skip
    lengths = torch.full((B,), S, dtype=torch.int64, device=device)
    return cache, {"slots": torch.tensor(slots, device=device), "seqlens_k": lengths}


def write(sizes: Sizes, dtype: torch.dtype) -> Work:
    """attention.cache, mla.cache: the write of one layer: 2 s T W bytes for T tokens of W numbers (K (D + E),
    or L + R); no FLOPs."""
    B = int(sizes["sequences"])
    lengths = shared_out(int(sizes["tokens"]), B)
    T = sum(lengths)
    width = sum(x[0].numel() for x in _rows(sizes, dtype, 1, 0))

    def tensors(seed: int) -> dict[str, Tensor]:
        first, second = _rows(sizes, dtype, T, seed)
        return {"first": first, "second": second}

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        device = x["first"].device
        cache = parts[-1](_spec(sizes, dtype, device, T + B))
        slots = [cache.allocate(length) for length in lengths]
        owners = torch.repeat_interleave(torch.tensor(slots), torch.tensor(lengths)).to(device)
        places = torch.cat([torch.arange(length) for length in lengths]).to(device)
        layer = cache.layers[0]
        return lambda: layer.write(x["first"], x["second"], slots_T=owners, positions_T=places)

    return Work(tensors=tensors, prepare=call, bytes=2.0 * dtype.itemsize * T * width, flops=0.0)


def _window(sizes: Sizes) -> int | None:
    """True stands for half of the context."""
    return max(1, int(sizes["context"]) // 2) if sizes["window"] else None


def _new(sizes: Sizes) -> int:
    return int(sizes.get("new_tokens", 1))


def _common(sizes: Sizes) -> Common:
    """What an engine tells every layer of a pass; each call here is a pass of its own."""
    B, S = int(sizes["sequences"]), int(sizes["context"])
    ends = list(range(0, B * _new(sizes) + 1, _new(sizes))) if "new_tokens" in sizes else None
    return Common(cu_seqlens=ends, seqlens_k=[S] * B, max_seqlen_k=S)


def read(sizes: Sizes, dtype: torch.dtype) -> Work:
    """attention.prefill, attention.decode: n new tokens of each of B sequences that hold S: s B (n H + S K)
    (D + E) bytes; 2 H (D + E) FLOPs for each pair of a query and a key that it sees."""
    B, S, n = int(sizes["sequences"]), int(sizes["context"]), _new(sizes)
    H, _, D, E = heads(sizes)
    window = _window(sizes)

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        cache, given = filled(parts[0], sizes, dtype, x["q"].device)
        if "new_tokens" in sizes:
            given["cu_seqlens_q"] = torch.arange(0, B * n + 1, n, dtype=torch.int32, device=x["q"].device)
        layer = cache.layers[0]
        return lambda: parts[-1](x["q"], layer, scale=D**-0.5, window=window, common=_common(sizes), **given)

    return Work(
        tensors=lambda seed: {"q": numbers(seeded(seed), B * n, H, D, dtype=dtype)},
        prepare=call,
        bytes=traffic(sizes, dtype, B * n, B * S),
        flops=2.0 * H * (D + E) * B * seen(S - n, n, window),
    )


def step(sizes: Sizes, dtype: torch.dtype) -> Work:
    """attention.step: as attention.decode, and s B (H D + K (D + E)) bytes more: it reads keys and values of
    the new tokens and writes them (s B K (D + E) twice), and its queries come with them."""
    B, S = int(sizes["sequences"]), int(sizes["context"])
    H, K, D, E = heads(sizes)
    R = int(sizes["rotary_dim"]) // 2
    norms, window = bool(sizes["qk_norm"]), _window(sizes)

    def tensors(seed: int) -> dict[str, Tensor]:
        drawn = {
            "qkv": numbers(seeded(seed), B, (H + K) * D + K * E, dtype=dtype),
            "cos": torch.full((B, R), 0.6),
            "sin": torch.full((B, R), 0.8),
        }
        return drawn | ({name: torch.ones(D, dtype=dtype) for name in ("q_norm", "k_norm")} if norms else {})

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        cache, given = filled(parts[0], sizes, dtype, x["qkv"].device)
        layer, positions = cache.layers[0], given["seqlens_k"] - 1
        return lambda: parts[-1](
            x["qkv"], layer, cos_BR=x["cos"], sin_BR=x["sin"], positions=positions, slots=given["slots"],
            num_heads=H, scale=D**-0.5, window=window, interleaved=bool(sizes["interleaved"]),
            q_norm=x.get("q_norm"), k_norm=x.get("k_norm"), eps=1e-6, common=_common(sizes),
        )  # fmt: skip

    return Work(
        tensors=tensors,
        prepare=call,
        bytes=traffic(sizes, dtype, B, B * S) + 2.0 * dtype.itemsize * B * K * (D + E) + 8.0 * B * R,
        flops=2.0 * H * (D + E) * B * seen(S - 1, 1, window),
    )


def latent_read(sizes: Sizes, dtype: torch.dtype) -> Work:
    """mla.prefill, mla.decode: s (B n H (N + R + E) + B S (L + R) + H (N + E) L) bytes. FLOPs of the cheaper
    form: absorbed 2 B n H (N + E) L + 2 H (2 L + R) a pair, or expanded 2 B S H (N + E) L + 2 H (N + R + E)
    a pair; B (n S - n (n - 1) / 2) pairs."""
    B, S, n = int(sizes["sequences"]), int(sizes["context"]), _new(sizes)
    H, N, R, E, L = latent_sizes(sizes)
    pairs = B * seen(S - n, n)
    absorbed = 2.0 * B * n * H * (N + E) * L + 2.0 * H * (2 * L + R) * pairs
    expanded = 2.0 * B * S * H * (N + E) * L + 2.0 * H * (N + R + E) * pairs

    def tensors(seed: int) -> dict[str, Tensor]:
        drawn = latent_tensors(sizes, dtype, B * n, seed)
        return {name: drawn[name] for name in ("q_nope", "q_rope", "weight")}

    def call(parts: Sequence[Any], x: Tensors) -> Callable[[], Any]:
        cache, given = filled(parts[0], sizes, dtype, x["weight"].device)
        if "new_tokens" in sizes:
            ends = torch.arange(0, B * n + 1, n, dtype=torch.int32)
            given["cu_seqlens_q"] = ends.to(x["weight"].device)
        layer = cache.layers[0]
        w_uk, w_uv = torch.split(x["weight"], [N, E], 1)
        return lambda: parts[-1](
            x["q_nope"], x["q_rope"], layer, w_uk, w_uv, scale=(N + R) ** -0.5, common=_common(sizes), **given
        )

    return Work(
        tensors=tensors,
        prepare=call,
        bytes=float(dtype.itemsize * (B * n * H * (N + R + E) + B * S * (L + R) + H * (N + E) * L)),
        flops=min(absorbed, expanded),
    )


_DECODED = {"sequences": 16, "context": 1024}
_PREFILLED = {"sequences": 4, "context": 512, "new_tokens": 128}
_BIG = {"sequences": 256, "context": 4096}
_BIG_PREFILL = {"sequences": 8, "context": 8192, "new_tokens": 2048}
_QUICK = {"sequences": 2, "context": 128}
_FEW = {"sequences": 2, "context": 64, "new_tokens": 16}
_TURNED = {"rotary_dim": 128, "interleaved": False, "qk_norm": False}
LOADS = {
    "attention.cache": Load(
        sizes={"tokens": 2048, "sequences": 4, **HEADS}, quick={"tokens": 256},
        large={"tokens": 65536, "sequences": 64, **WIDE}, make=write,
    ),
    "attention.prefill": Load(
        sizes={**_PREFILLED, **HEADS}, quick=_FEW, large={**_BIG_PREFILL, **WIDE}, make=read
    ),
    "attention.decode": Load(sizes={**_DECODED, **HEADS}, quick=_QUICK, large={**_BIG, **WIDE}, make=read),
    "attention.step": Load(
        sizes={**_DECODED, **HEADS, **_TURNED}, quick=_QUICK, large={**_BIG, **WIDE}, make=step
    ),
    "mla.cache": Load(
        sizes={"tokens": 2048, "sequences": 4, **LATENTS}, quick={"tokens": 256},
        large={"tokens": 65536, "sequences": 64, **MANY}, make=write,
    ),
    "mla.prefill": Load(
        sizes={**_PREFILLED, **LATENTS}, quick=_FEW, large={**_BIG_PREFILL, **MANY}, make=latent_read
    ),
    "mla.decode": Load(
        sizes={**_DECODED, **LATENTS}, quick=_QUICK, large={**_BIG, **MANY}, make=latent_read
    ),
}  # fmt: skip
