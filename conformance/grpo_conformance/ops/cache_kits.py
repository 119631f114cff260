"""The two kinds of token caches: how tokens are written and read, and what attention over them gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec

from . import oracles
from .facts import Facts
from .mla import expand
from .question import normal

KV_HEADS = 2
LAYERS = 2
EPS = 1e-6
Reader = Callable[..., Tensor]


class Kit(Protocol):
    """A token is a row of `width` numbers, whatever the cache makes of it."""

    @property
    def facts(self) -> Facts: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def width(self) -> int: ...

    @property
    def queries(self) -> tuple[int, int]:
        """Heads and size of a query."""
        ...

    def spec(self, device: torch.device, max_slots: int, max_tokens: int) -> CacheSpec: ...

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's `write` takes."""
        ...

    def read(self, op: Reader, q: Tensor, layer: Any, window: int | None, **rest: Any) -> Tensor:
        """Prefill or decode."""
        ...

    def expect(self, rows: Tensor, q: Tensor, window: int | None) -> Tensor:
        """Attention of the last queries over rows, in float64."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """`attention.cache`: keys and values of two heads."""

    facts: Facts
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """Head dims of keys and values."""
        return int(self.facts["head_dim"]), int(self.facts["v_head_dim"])

    @property
    def width(self) -> int:
        return KV_HEADS * sum(self.sizes)

    @property
    def queries(self) -> tuple[int, int]:
        return KV_HEADS * int(self.facts["num_key_value_groups"]), self.sizes[0]

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.sizes[0] ** -0.5)

    def spec(self, device: torch.device, max_slots: int, max_tokens: int) -> CacheSpec:
        D, E = self.sizes
        return CacheSpec(
            num_layers=LAYERS, num_key_value_heads=KV_HEADS, head_dim=D, v_head_dim=E, dtype=self.dtype,
            device=device, max_slots=max_slots, max_tokens=max_tokens,
        )  # fmt: skip

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        D, E = self.sizes
        keys, values = torch.split(rows, [KV_HEADS * D, KV_HEADS * E], 1)
        return torch.unflatten(keys, 1, (KV_HEADS, D)), torch.unflatten(values, 1, (KV_HEADS, E))

    def read(self, op: Reader, q: Tensor, layer: Any, window: int | None, **rest: Any) -> Tensor:
        return op(q, layer, scale=self.scale, window=window, **rest)

    def expect(self, rows: Tensor, q: Tensor, window: int | None) -> Tensor:
        keys, values = self.parts(rows)
        return _last(q, keys, values, self.scale, window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """`mla.cache`: a latent and a rotary key."""

    facts: Facts
    dtype: torch.dtype
    weight_HUL: Tensor
    """w_uk and w_uv of each head, one below the other."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Ranks of the latent, sizes of a key's parts with and without rotary."""
        rank, rope, nope = (
            int(self.facts[name]) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")
        )
        return rank, rope, nope

    @property
    def width(self) -> int:
        return self.sizes[0] + self.sizes[1]

    @property
    def queries(self) -> tuple[int, int]:
        return int(self.facts["num_attention_heads"]), self.sizes[1] + self.sizes[2]

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.queries[1] ** -0.5)

    def spec(self, device: torch.device, max_slots: int, max_tokens: int) -> CacheSpec:
        return CacheSpec(
            num_layers=LAYERS, num_key_value_heads=1, head_dim=self.width, v_head_dim=self.sizes[0],
            dtype=self.dtype, device=device, max_slots=max_slots, max_tokens=max_tokens,
        )  # fmt: skip

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        latent, turned = torch.split(rows, list(self.sizes[:2]), 1)
        return latent, turned

    def read(self, op: Reader, q: Tensor, layer: Any, window: int | None, **rest: Any) -> Tensor:
        _, rope, nope = self.sizes
        weight = self.weight_HUL.to(q.device)
        w_uk, w_uv = torch.split(weight, [nope, int(self.facts["v_head_dim"])], 1)
        q_nope, q_rope = torch.split(q, [nope, rope], -1)
        return op(q_nope, q_rope, layer, w_uk, w_uv, scale=self.scale, **rest)

    def expect(self, rows: Tensor, q: Tensor, window: int | None) -> Tensor:
        nope = self.sizes[2]
        keys, values = expand(rows, self.weight_HUL[:, :nope], self.weight_HUL[:, nope:])
        return _last(q, keys, values, self.scale, None)


def _last(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    wide = torch.zeros(len(keys), *q.shape[1:], dtype=torch.float64)
    wide[len(keys) - len(q) :] = q.double()
    o = oracles.attention(
        wide, keys, values, lengths=[len(keys)], parents=[-1], scale=scale, causal=True, window=window
    )
    return o[len(keys) - len(q) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Inputs of `attention.step` for some sequences, and what they mean."""

    tensors: Mapping[str, Tensor]
    """qkv, cos, sin, positions, slots, and the norms where the facts have them."""

    @classmethod
    def draw(cls, kit: Heads, generator: torch.Generator, positions: list[int], slots: list[int]) -> Stepped:
        """One token for each sequence."""
        (H, D), E = kit.queries, kit.sizes[1]
        # The least head dim comes with the usual rotary dim.
        R = min(D, int(kit.facts["rotary_dim"])) // 2
        angles = 6 * torch.rand(len(positions), R, generator=generator, dtype=torch.float64)
        tensors = {
            "qkv_BW": normal(generator, len(positions), (H + KV_HEADS) * D + KV_HEADS * E, dtype=kit.dtype),
            "cos_BR": angles.cos().float(),
            "sin_BR": angles.sin().float(),
            "positions": torch.tensor(positions),
            "slots": torch.tensor(slots),
        }
        if kit.facts["qk_norm"]:
            tensors |= {
                name: 1 + normal(generator, D, dtype=kit.dtype, scale=0.2) for name in ("q_norm", "k_norm")
            }
        return cls(tensors=tensors)

    def rest(self, kit: Heads, window: int | None) -> dict[str, Any]:
        """Arguments that are not tensors; and None for norms that are not there."""
        H = kit.queries[0]
        return {"num_heads": H, "scale": kit.scale, "window": window, "eps": EPS,
                "interleaved": bool(kit.facts["interleaved"]),
                **{name: None for name in ("q_norm", "k_norm") if name not in self.tensors}}  # fmt: skip

    def truth(self, kit: Heads) -> tuple[Tensor, Tensor]:
        """(rows to be written, queries) in float64."""
        (H, D), E = kit.queries, kit.sizes[1]
        given = {name: x.double() if x.is_floating_point() else x for name, x in self.tensors.items()}
        q, k, v = torch.split(given["qkv_BW"], [H * D, KV_HEADS * D, KV_HEADS * E], 1)
        turned = []
        for x, heads, name in ((q, H, "q_norm"), (k, KV_HEADS, "k_norm")):
            x = torch.unflatten(x, 1, (heads, D))
            if name in given:
                x = oracles.rms_norm(x, given[name], eps=EPS, residual=None, zero_centered=False)
            turned.append(
                oracles.turn(x, given["cos_BR"], given["sin_BR"], interleaved=bool(kit.facts["interleaved"]))
            )
        return torch.cat([turned[1].flatten(1), v], 1), turned[0]
