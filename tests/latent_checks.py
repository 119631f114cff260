"""Checks of latent attention and its caches, against attention over expanded keys and values in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cache_checks
import op_oracles as oracle
import pytest
import torch
from torch import Tensor

from grpo_conformance.ops.mla import expand
from grpo_conformance.ops.question import cumulative
from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.mla import LatentCache

H, N, R, E, L = 3, 8, 4, 6, 20
SCALE = 0.3
TREES = {
    "one": ([9], [-1]),
    "alone": ([5, 0, 7, 3], [-1, -1, -1, -1]),
    "families": ([5, 3, 0, 7, 1, 4, 2], [-1, 0, -1, -1, 3, 0, 2]),
}


def weights(dtype: torch.dtype, sizes: Sequence[int] = (H, N, E, L)) -> tuple[Tensor, Tensor]:
    """w_uk and w_uv as views of one parameter, as a decoder has them."""
    heads, nope, value, latent = sizes
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(heads, nope + value, latent, generator=generator) / latent**0.5
    w_uk, w_uv = both.to(dtype).split([nope, value], 1)
    return w_uk, w_uv


def check_varlen(
    impl: Callable[..., Tensor], dtype: torch.dtype, lengths: Sequence[int], parents: Sequence[int] | None,
    sizes: tuple[int, int, int, int, int] = (H, N, R, E, L),
) -> None:  # fmt: skip
    """Outputs and all six gradients."""
    heads, nope, rope, value, latent = sizes
    generator = torch.Generator().manual_seed(2)
    T = sum(lengths)
    shapes = ((T, heads, nope), (T, heads, rope), (T, latent), (T, rope))
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    given += weights(dtype, (heads, nope, value, latent))
    tree = None if parents is None else torch.tensor(parents, dtype=torch.int32)

    def run(*x: Tensor) -> Tensor:
        return impl(*x, cu_seqlens=cumulative(lengths), parents=tree, max_seqlen=max(lengths), scale=SCALE)

    def expected(*x: Tensor) -> Tensor:
        k, v = expand(torch.cat([x[2], x[3]], 1), x[4], x[5])
        q = torch.cat([x[0], x[1]], -1)
        alone = [-1] * len(lengths)
        return oracle.attention(
            q, k, v, lengths=lengths, parents=parents or alone, scale=SCALE, causal=True, window=None
        )

    got = oracle.with_grads(run, given)
    wanted = oracle.with_grads(expected, [x.double() for x in given])
    assert got[0].dtype == dtype
    oracle.assert_close(got, wanted, dtype)


def check_isolation(impl: Callable[..., Tensor], dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """NaN in one sequence stays in it, forward and backward (weights see every token and are left out)."""
    heads, nope, rope, value, latent = sizes
    w_uk, w_uv = weights(dtype, (heads, nope, value, latent))
    given = [torch.randn(18, *s).to(dtype) for s in ((heads, nope), (heads, rope), (latent,), (rope,))]
    for x in given:
        x[7:12] = torch.nan
    leaves = [x.requires_grad_() for x in given]
    o = impl(*leaves, w_uk, w_uv, cu_seqlens=cumulative([7, 5, 6]), parents=None, max_seqlen=7, scale=SCALE)
    grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
    clean = torch.ones(18, dtype=torch.bool)
    clean[7:12] = False
    assert o[clean].isfinite().all() and o[~clean].isnan().all()
    assert all(grad[clean].isfinite().all() for grad in grads)


def latent_spec(spec: CacheSpec) -> CacheSpec:
    return replace(spec, num_key_value_heads=1, head_dim=L + R, v_head_dim=L)


@dataclass
class LatentModel(cache_checks.Model):
    """`cache_checks.Model` with rows [latent | rotary key] where that has keys; windows are not known."""

    sizes: tuple[int, int, int, int, int] = (H, N, R, E, L)
    weights: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        heads, nope, _, value, latent = self.sizes
        self.weights = weights(self.dtype, (heads, nope, value, latent))

    def adopt(self, slot: int | None, parent: int | None = None, prefix: int = 0) -> int:
        assert slot is not None
        width = self.sizes[2] + self.sizes[4]
        start = torch.empty(0, width, dtype=self.dtype)
        self.keys[slot] = start if parent is None else self.keys[parent][:prefix]
        return slot

    def write(self, slots: list[int], counts: list[int]) -> None:
        rope, latent = self.sizes[2], self.sizes[4]
        rows = self.random(sum(counts), latent + rope)
        positions = [len(self.keys[s]) + i for s, n in zip(slots, counts, strict=True) for i in range(n)]
        slots_T = torch.tensor([s for s, n in zip(slots, counts, strict=True) for _ in range(n)])
        for layer, sign in ((0, -1), (1, 1)):
            latents, keys = (sign * rows).split([latent, rope], 1)
            self.cache.layers[layer].write(
                latents, keys, slots_T=slots_T, positions_T=torch.tensor(positions)
            )
        for slot, new in zip(slots, rows.split(counts), strict=True):
            self.keys[slot] = torch.cat([self.keys[slot], new])

    def expect(self, slot: int, q: Tensor, window: int | None, length: int | None = None) -> Tensor:
        k, v = expand(self.keys[slot][:length], *self.weights)
        wide = torch.zeros(len(k), *q.shape[1:], dtype=torch.float64)
        wide[len(k) - len(q) :] = q.double()
        o = oracle.attention(
            wide, k, v, lengths=[len(k)], parents=[-1], scale=SCALE, causal=True, window=None
        )
        return o[len(k) - len(q) :]

    def _run(self, op: Callable[..., Tensor], tokens: int, **rest: Any) -> tuple[Tensor, Tensor]:
        heads, nope, rope, _, _ = self.sizes
        q = self.random(tokens, heads, nope + rope)
        parts = q.split([nope, rope], -1)
        return q, op(*parts, self.cache.layers[1], *self.weights, scale=SCALE, **rest)

    def check_decode(self, slots: list[int], window: int | None) -> None:
        if window is not None:
            return
        lengths = torch.tensor([len(self.keys[s]) for s in slots])
        q, got = self._run(self.decode, len(slots), seqlens_k=lengths, slots=torch.tensor(slots))
        wanted = torch.cat([self.expect(s, q[i : i + 1], None) for i, s in enumerate(slots)])
        assert got.dtype == self.dtype
        oracle.assert_close([got], [wanted], self.dtype)

    def check_prefill(self, slots: list[int], counts: list[int], window: int | None) -> None:
        if window is not None:
            return
        lengths = torch.tensor([len(self.keys[s]) for s in slots])
        ends = cumulative(counts)
        q, got = self._run(
            self.prefill, sum(counts), cu_seqlens_q=ends, seqlens_k=lengths, slots=torch.tensor(slots)
        )
        parts = [self.expect(s, rows, None) for s, rows in zip(slots, q.split(counts), strict=True)]
        assert got.dtype == self.dtype
        oracle.assert_close([got], [torch.cat(parts)], self.dtype)


def check_long_prefills(model: LatentModel) -> None:
    """Whole prompts at once; then many and few new tokens after prefixes, as chunked prefill has them."""
    cache = model.cache
    first, second = model.adopt(cache.allocate(60)), model.adopt(cache.allocate(50))
    model.write([first, second], [40, 30])
    model.check_prefill([second, first], [30, 40], None)
    model.write([first, second], [20, 1])
    model.check_prefill([first, second], [20, 1], None)
    model.check_prefill([first, second], [60, 0], None)
    child = model.adopt(cache.fork(first, prefix=55, length=9), first, 55)
    model.write([child], [9])
    model.check_prefill([child, second], [9, 2], None)
    model.check_decode([second, child], None)


def check_bad_specs(make: Callable[[CacheSpec], LatentCache]) -> None:
    good = latent_spec(cache_checks.spec(torch.float32))
    for wrong in (replace(good, num_key_value_heads=2), replace(good, v_head_dim=L + R + 1)):
        with pytest.raises(ValueError, match="a latent cache has one head"):
            make(wrong)


def check_writes_stay_in_their_room(make: Callable[[CacheSpec], LatentCache]) -> None:
    cache = make(latent_spec(cache_checks.spec(torch.float32)))
    slot = cache.allocate(4)
    assert slot is not None and cache.allocate(4) is not None
    for position in (4, -1, 10_000):
        with pytest.raises(IndexError, match="no room"):
            cache.layers[0].write(
                torch.ones(1, L), torch.ones(1, R), slots_T=torch.tensor([slot]),
                positions_T=torch.tensor([position]),
            )  # fmt: skip
