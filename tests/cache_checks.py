"""Checks of a key/value cache with its prefill and decode, against lists of every sequence's tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import op_oracles as oracle
import pytest
import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec, KVCache

H, K, D, E = 6, 2, 8, 4


def spec(dtype: torch.dtype, max_slots: int = 16, max_tokens: int = 200) -> CacheSpec:
    return CacheSpec(
        num_layers=2, num_key_value_heads=K, head_dim=D, v_head_dim=E, dtype=dtype,
        device=torch.device("cpu"), max_slots=max_slots, max_tokens=max_tokens,
    )  # fmt: skip


@dataclass
class Model:
    """The cache under test, and what every live slot should hold in layer 1."""

    cache: KVCache
    decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    dtype: torch.dtype
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def adopt(self, slot: int | None, parent: int | None = None, prefix: int = 0) -> int:
        assert slot is not None
        source = self.keys[parent][:prefix] if parent is not None else torch.empty(0, K, D, dtype=self.dtype)
        self.keys[slot] = source
        self.values[slot] = (
            self.values[parent][:prefix] if parent is not None else torch.empty(0, K, E, dtype=self.dtype)
        )
        return slot

    def write(self, slots: list[int], counts: list[int]) -> None:
        """Append tokens to several slots in one call; other content goes to layer 0."""
        k, v = self.random(sum(counts), K, D), self.random(sum(counts), K, E)
        positions = [len(self.keys[s]) + i for s, n in zip(slots, counts, strict=True) for i in range(n)]
        slots_T = torch.tensor([s for s, n in zip(slots, counts, strict=True) for _ in range(n)])
        for layer, sign in ((0, -1), (1, 1)):
            self.cache.layers[layer].write(
                sign * k, sign * v, slots_T=slots_T, positions_T=torch.tensor(positions)
            )
        at = 0
        for slot, count in zip(slots, counts, strict=True):
            self.keys[slot] = torch.cat([self.keys[slot], k[at : at + count]])
            self.values[slot] = torch.cat([self.values[slot], v[at : at + count]])
            at += count

    def expect(self, slot: int, q: Tensor, window: int | None, length: int | None = None) -> Tensor:
        """Attention of the last queries of a slot over what it holds."""
        k, v = self.keys[slot][:length], self.values[slot][:length]
        wide = torch.zeros(len(k), H, D, dtype=torch.float64)
        wide[len(k) - len(q) :] = q.double()
        o = oracle.attention(
            wide, k, v, lengths=[len(k)], parents=[-1], scale=0.3, causal=True, window=window
        )
        return o[len(k) - len(q) :]

    def check_decode(self, slots: list[int], window: int | None) -> None:
        q = self.random(len(slots), H, D)
        got = self.decode(
            q, self.cache.layers[1], seqlens_k=torch.tensor([len(self.keys[s]) for s in slots]),
            slots=torch.tensor(slots), scale=0.3, window=window,
        )  # fmt: skip
        wanted = torch.cat([self.expect(s, q[i : i + 1], window) for i, s in enumerate(slots)])
        assert got.dtype == self.dtype
        oracle.assert_close([got], [wanted], self.dtype)

    def check_prefill(self, slots: list[int], counts: list[int], window: int | None) -> None:
        """The last `counts` tokens of each slot as queries; a count may be 0."""
        q = self.random(sum(counts), H, D)
        ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
        got = self.prefill(
            q, self.cache.layers[1], cu_seqlens_q=torch.tensor(ends, dtype=torch.int32),
            seqlens_k=torch.tensor([len(self.keys[s]) for s in slots]), slots=torch.tensor(slots),
            scale=0.3, window=window,
        )  # fmt: skip
        parts = [self.expect(s, q[a:b], window) for s, a, b in zip(slots, ends, ends[1:], strict=False)]
        oracle.assert_close([got], [torch.cat(parts)], self.dtype)


def check_generation(model: Model) -> None:
    """Prompts, forks, freed parents, forks of forks and shuffled batches, as an engine makes them."""
    shuffle = random.Random(3)
    cache = model.cache
    long, short = model.adopt(cache.allocate(7)), model.adopt(cache.allocate(5))
    alone = model.adopt(cache.allocate(12))
    model.write([long, short, alone], [7, 5, 3])
    for window in (None, 1, 4):
        model.check_prefill([long, short, alone], [7, 5, 3], window)
        model.check_prefill([alone, long, short], [1, 0, 2], window)
        model.check_decode([short, alone, long], window)
    children = [model.adopt(cache.fork(long, prefix=7, length=8), long, 7) for _ in range(3)]
    children += [model.adopt(cache.fork(short, prefix=4, length=8), short, 4) for _ in range(2)]
    children.append(model.adopt(cache.fork(long, prefix=6, length=8), long, 6))
    cache.free(long)
    live = [*children, alone]
    for step in range(6):
        shuffle.shuffle(live)
        batch = live[: shuffle.randint(2, len(live))] if step % 2 else live
        model.write(batch, [1] * len(batch))
        for window in (None, 1, 4):
            model.check_decode(batch, window)
        if step == 2:
            parent = children[0]
            prefix = len(model.keys[parent])
            grandchild = model.adopt(cache.fork(parent, prefix=prefix, length=6), parent, prefix)
            live = [s for s in live if s != parent] + [grandchild]
            cache.free(parent)
            cache.free(children[1])
            live.remove(children[1])
    model.write([alone, grandchild], [2, 2])
    for window in (None, 2):
        model.check_prefill([grandchild, alone], [2, 2], window)


def check_a_slot_used_again(model: Model) -> None:
    """A freed slot's number comes back with other lengths and another parent."""
    cache = model.cache
    for length in (3, 9, 5):
        parent = model.adopt(cache.allocate(length))
        model.write([parent], [length])
        children = [
            model.adopt(cache.fork(parent, prefix=length, length=2), parent, length) for _ in range(2)
        ]
        model.write(children, [1, 1])
        model.check_decode(children, None)
        for slot in (parent, *children):
            cache.free(slot)


def check_room(make: Callable[[CacheSpec], KVCache]) -> None:
    """Every slot and token of the spec can be used; a refusal changes nothing; freed room comes back."""
    cache = make(spec(torch.float32, max_slots=4, max_tokens=40))
    parent = cache.allocate(10)
    assert parent is not None
    assert cache.allocate(31) is None
    children = [cache.fork(parent, prefix=10, length=10) for _ in range(3)]
    assert None not in children
    assert cache.allocate(0) is None  # tokens are left for none, and so are slots
    cache.free(parent)
    assert cache.allocate(1) is None  # the parent's tokens stay while its children live
    for child in children[:2]:
        cache.free(child)
    again = cache.allocate(20)
    assert again is not None
    cache.free(again)
    cache.free(children[2])
    whole = cache.allocate(40)
    assert whole is not None
    cache.free(whole)
    cache.allocate(40)
    cache.reset()
    assert cache.allocate(40) is not None


def check_misuse(make: Callable[[CacheSpec], KVCache]) -> None:
    cache = make(spec(torch.float32))
    slot = cache.allocate(4)
    for call in (
        lambda: cache.allocate(-1),
        lambda: cache.fork(slot, prefix=5, length=1),
        lambda: cache.fork(slot + 1, prefix=0, length=1),
        lambda: cache.free(slot + 1),
    ):
        with pytest.raises(ValueError):
            call()
    cache.free(slot)
    with pytest.raises(ValueError, match="not alive"):
        cache.free(slot)


def check_release(model: Model) -> None:
    cache = model.cache
    full = cache.nbytes()
    assert full >= 2 * 200 * K * (D + E) * torch.finfo(model.dtype).bits // 8
    slot = cache.allocate(3)
    with pytest.raises(RuntimeError, match="alive"):
        cache.release()
    cache.free(slot)
    cache.release()
    assert cache.nbytes() == 0
    cache.restore()
    assert cache.nbytes() == full
    slot = model.adopt(cache.allocate(3))
    model.write([slot], [3])
    model.check_decode([slot], None)


def check_writes_stay_in_their_room(make: Callable[[CacheSpec], KVCache]) -> None:
    cache = make(spec(torch.float32))
    slot, other = cache.allocate(4), cache.allocate(4)
    assert other is not None
    for position in (4, -1, 10_000):
        with pytest.raises(IndexError, match="no room"):
            cache.layers[0].write(
                torch.ones(1, K, D), torch.ones(1, K, E), slots_T=torch.tensor([slot]),
                positions_T=torch.tensor([position]),
            )  # fmt: skip
