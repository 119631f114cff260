"""The paged cache of the C++ pack against the float32 reference and a float64 softmax."""

from __future__ import annotations

import importlib
import itertools
import random

import pytest
import torch

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.reference import attention as reference
from grpo_core.ops.reference.fused import rms_norm, rope_apply
from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native_cache = importlib.import_module("grpo_cpu.native_cache")

BF16, F32 = torch.bfloat16, torch.float32
# In bf16, weights are rounded by 2^-8, which moves o by at most 2^-8 sum w |v|, and |v| averages 0.8 here;
# both outputs are rounded by 2^-8. In float32, scores of up to 6 move their weights by 6 * 2^-23.
NEAR = {BF16: {"rtol": 2**-7, "atol": 2**-7}, F32: {"rtol": 2**-19, "atol": 2**-19}}
FLOATS = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])


def spec(K=2, D=64, E=64, slots=16, tokens=4000, layers=1, dtype=BF16) -> CacheSpec:
    return CacheSpec(
        num_layers=layers,
        num_key_value_heads=K,
        head_dim=D,
        v_head_dim=E,
        dtype=dtype,
        device=torch.device("cpu"),
        max_slots=slots,
        max_tokens=tokens,
    )


def pair(sizes: CacheSpec):
    """The cache under test and the reference, in the same state."""
    return native_cache.PagedCache(sizes), reference.DenseCache(sizes)


def poison(cache) -> None:
    """NaN wherever nothing was written: a kernel that reads it is found out."""
    for layer in cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))


def fill(caches, slots, start: int, count: int, sizes: CacheSpec, seed: int) -> None:
    """The same random tokens at positions start.. of one slot of each cache."""
    draw = torch.Generator().manual_seed(seed)
    k = torch.randn(count, sizes.num_key_value_heads, sizes.head_dim, generator=draw).to(sizes.dtype)
    v = torch.randn(count, sizes.num_key_value_heads, sizes.v_head_dim, generator=draw).to(sizes.dtype)
    for cache, slot in zip(caches, slots, strict=True):
        where = torch.full((count,), slot)
        cache.layers[0].write(k, v, slots_T=where, positions_T=torch.arange(start, start + count))


@pytest.mark.parametrize(
    "H, K, D, E", [(9, 3, 64, 64), (4, 4, 32, 96), (8, 1, 128, 128), (14, 2, 96, 32), (7, 1, 256, 64)]
)
@pytest.mark.parametrize("window", [None, 1, 37])
@FLOATS
def test_decode_over_shared_prefix_and_own_suffix(H, K, D, E, window, dtype):
    sizes = spec(K=K, D=D, E=E, dtype=dtype)
    caches = pair(sizes)
    poison(caches[0])
    roots = [cache.allocate(50) for cache in caches]
    fill(caches, roots, 0, 50, sizes, 0)
    slots, lengths = [roots], [50]
    for seed, (prefix, own) in enumerate(
        [(50, 1), (50, 31), (50, 33), (17, 64), (32, 7), (0, 5), (50, 130), (16, 16), (15, 17)], start=1
    ):
        slots.append(
            [cache.fork(root, prefix=prefix, length=own) for cache, root in zip(caches, roots, strict=True)]
        )
        fill(caches, slots[-1], prefix, own, sizes, seed)
        lengths.append(prefix + own)
    q = torch.randn(len(slots), H, D, generator=torch.Generator().manual_seed(99)).to(dtype)
    out = [
        op(
            q,
            cache.layers[0],
            seqlens_k=torch.tensor(lengths),
            slots=torch.tensor([s[i] for s in slots]),
            scale=D**-0.5,
            window=window,
        )
        for i, (op, cache) in enumerate(zip((native_cache.decode, reference.decode), caches, strict=True))
    ]
    torch.testing.assert_close(out[0], out[1], **NEAR[dtype])


@pytest.mark.parametrize("window", [None, 9])
@FLOATS
def test_prefill_of_ragged_prompts_and_after_a_prefix(window, dtype):
    sizes = spec(K=2, D=64, E=64, dtype=dtype)
    caches = pair(sizes)
    poison(caches[0])
    new, total, slots = [1, 33, 200, 0, 5], [1, 33, 200, 12, 70], []
    for seed, length in enumerate(total):
        slots.append([cache.allocate(length) for cache in caches])
        fill(caches, slots[-1], 0, length, sizes, seed)
    cu = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    qkv = torch.randn(sum(new), 6 + 4, 64, generator=torch.Generator().manual_seed(7)).to(dtype)
    q = qkv[:, :6]
    assert not q.is_contiguous()
    out = [
        op(
            q,
            cache.layers[0],
            cu_seqlens_q=cu,
            seqlens_k=torch.tensor(total),
            slots=torch.tensor([s[i] for s in slots]),
            scale=0.125,
            window=window,
        )
        for i, (op, cache) in enumerate(zip((native_cache.prefill, reference.prefill), caches, strict=True))
    ]
    torch.testing.assert_close(out[0], out[1], **NEAR[dtype])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("H, K, D, R", [(9, 3, 64, 32), (4, 4, 32, 8), (8, 1, 128, 64), (2, 1, 64, 13)])
@FLOATS
def test_step_equals_norm_rope_write_and_decode(H, K, D, R, qk_norm, interleaved, dtype):
    sizes = spec(K=K, D=D, E=D, dtype=dtype)
    caches = pair(sizes)
    poison(caches[0])
    draw = torch.Generator().manual_seed(3)
    roots = [cache.allocate(21) for cache in caches]
    fill(caches, roots, 0, 21, sizes, 0)
    slots = [
        [cache.fork(root, prefix=21, length=40) for cache, root in zip(caches, roots, strict=True)]
        for _ in range(3)
    ]
    q_norm, k_norm = torch.randn(2, D, generator=draw).to(dtype) if qk_norm else (None, None)
    position = torch.tensor([21, 21, 21])
    for _ in range(34):
        qkv = torch.randn(3, (H + 2 * K) * D, generator=draw).to(dtype)
        angle = torch.rand(3, R, generator=draw) * 6
        before = qkv.clone()
        got = native_cache.step(
            qkv,
            caches[0].layers[0],
            cos_BR=angle.cos(),
            sin_BR=angle.sin(),
            positions=position,
            slots=torch.tensor([s[0] for s in slots]),
            num_heads=H,
            scale=D**-0.5,
            window=None,
            interleaved=interleaved,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=1e-6,
        )
        assert torch.equal(qkv, before)
        q, k, v = qkv.view(3, -1, D).split([H, K, K], 1)
        if qk_norm:
            q = rms_norm(q, q_norm, eps=1e-6, residual=None, zero_centered=False)
            k = rms_norm(k, k_norm, eps=1e-6, residual=None, zero_centered=False)
        q, k = rope_apply(q, k, angle.cos(), angle.sin(), interleaved=interleaved)
        theirs = torch.tensor([s[1] for s in slots])
        caches[1].layers[0].write(k, v, slots_T=theirs, positions_T=position)
        want = reference.decode(
            q, caches[1].layers[0], seqlens_k=position + 1, slots=theirs, scale=D**-0.5, window=None
        )
        # A rotated key may round to the neighbouring bf16 (2^-8 relative): scores of size 3 move by 0.02.
        # In float32 those of size 20 that unit norms make move by 20 * 2^-22.
        near = 2**-5 if dtype == BF16 else 2**-17
        torch.testing.assert_close(got.view_as(want), want, rtol=near, atol=near)
        position = position + 1


@FLOATS
def test_slots_come_and_go_without_touching_each_other(dtype):
    """Random opens, forks, writes and frees: every living slot reads back what was written to it."""
    sizes = spec(K=1, D=32, E=32, slots=12, tokens=600, dtype=dtype)
    caches = pair(sizes)
    poison(caches[0])
    dice, alive = random.Random(5), []
    for turn in range(300):
        if alive and dice.random() < 0.4:
            ours, theirs, _ = alive.pop(dice.randrange(len(alive)))
            caches[0].free(ours)
            caches[1].free(theirs)
            continue
        own = dice.randrange(0, 90)
        if alive and dice.random() < 0.6:
            parent = dice.choice(alive)
            prefix = dice.randrange(0, parent[2] + 1)
            new = [
                cache.fork(slot, prefix=prefix, length=own)
                for cache, slot in zip(caches, parent, strict=False)
            ]
        else:
            prefix, new = 0, [cache.allocate(own) for cache in caches]
        assert (new[0] is None) == (new[1] is None)
        if new[0] is None:
            continue
        fill(caches, new, prefix, own, sizes, turn)
        if prefix + own:
            alive.append((*new, prefix + own))
        else:
            caches[0].free(new[0])
            caches[1].free(new[1])
        if alive:
            q = torch.randn(len(alive), 3, 32, generator=torch.Generator().manual_seed(turn)).to(dtype)
            lengths = torch.tensor([entry[2] for entry in alive])
            got = native_cache.decode(
                q,
                caches[0].layers[0],
                seqlens_k=lengths,
                slots=torch.tensor([e[0] for e in alive]),
                scale=0.2,
                window=None,
            )
            want = reference.decode(
                q,
                caches[1].layers[0],
                seqlens_k=lengths,
                slots=torch.tensor([e[1] for e in alive]),
                scale=0.2,
                window=None,
            )
            torch.testing.assert_close(got, want, **NEAR[dtype])
    for ours, theirs, _ in alive:
        caches[0].free(ours)
        caches[1].free(theirs)
    assert caches[0].table.alive == caches[1].table.alive == 0
    assert sorted(caches[0].table._free_units) == list(range(caches[0].table.num_blocks))


def test_a_room_is_refused_only_when_tokens_or_slots_run_out():
    cache = native_cache.PagedCache(spec(slots=4, tokens=100))
    rooms = [cache.allocate(33) for _ in range(3)]
    assert None not in rooms
    assert cache.allocate(2) is None
    last = cache.allocate(1)
    assert last is not None and cache.allocate(0) is None
    cache.free(rooms[1])
    assert cache.fork(rooms[0], prefix=33, length=34) is None
    assert cache.fork(rooms[0], prefix=33, length=33) is not None


def test_a_freed_parent_keeps_its_tokens_until_its_last_child_goes():
    cache = native_cache.PagedCache(spec(slots=4, tokens=64))
    root = cache.allocate(40)
    children = [cache.fork(root, prefix=40, length=8) for _ in range(2)]
    cache.free(root)
    assert cache.allocate(9) is None
    with pytest.raises(ValueError, match="not alive"):
        cache.fork(root, prefix=1, length=1)
    with pytest.raises(RuntimeError, match="alive"):
        cache.release()
    for child in children:
        cache.free(child)
    held = cache.nbytes()
    cache.release()
    assert held > 0 and cache.nbytes() == 0
    cache.restore()
    assert cache.nbytes() == held and cache.allocate(64) is not None


@pytest.mark.parametrize("position", [-1, 9, 20])
def test_a_write_outside_of_the_slots_own_room_is_an_error_and_writes_nothing(position):
    sizes = spec(K=1, D=32, E=32)
    cache = native_cache.PagedCache(sizes)
    layer = cache.layers[0]
    child = cache.fork(cache.allocate(10), prefix=10, length=10)
    layer.keys.zero_()
    k = torch.ones(2, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(IndexError, match="no room"):
        layer.write(k, k, slots_T=torch.tensor([child, child]), positions_T=torch.tensor([12, position]))
    assert not layer.keys.any()
    with pytest.raises(IndexError):
        native_cache.decode(
            k,
            layer,
            seqlens_k=torch.tensor([5, 21]),
            slots=torch.tensor([child, child]),
            scale=1.0,
            window=None,
        )


@FLOATS
def test_extreme_scores_neither_overflow_nor_vanish(dtype):
    sizes = spec(K=1, D=32, E=32, dtype=dtype)
    caches = pair(sizes)
    slots = [cache.allocate(70) for cache in caches]
    fill(caches, slots, 0, 70, sizes, 0)
    q = (torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)) * 1000).to(dtype)
    out = [
        op(
            q,
            cache.layers[0],
            seqlens_k=torch.tensor([70, 1]),
            slots=torch.tensor([slot, slot]),
            scale=1.0,
            window=None,
        )
        for op, cache, slot in zip((native_cache.decode, reference.decode), caches, slots, strict=True)
    ]
    assert out[0].isfinite().all()
    torch.testing.assert_close(out[0], out[1], **NEAR[dtype])


@FLOATS
def test_results_do_not_depend_on_the_batch_around_a_sequence(dtype):
    sizes = spec(K=3, D=64, E=64, dtype=dtype)
    cache = native_cache.PagedCache(sizes)
    slots = [cache.allocate(60 + 13 * i) for i in range(6)]
    for i, slot in enumerate(slots):
        fill([cache], [slot], 0, 60 + 13 * i, sizes, i)
    q = torch.randn(6, 9, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    lengths = torch.tensor([60 + 13 * i for i in range(6)])
    together = native_cache.decode(
        q, cache.layers[0], seqlens_k=lengths, slots=torch.tensor(slots), scale=0.125, window=None
    )
    for i in range(6):
        alone = native_cache.decode(
            q[i : i + 1],
            cache.layers[0],
            seqlens_k=lengths[i : i + 1],
            slots=torch.tensor(slots[i : i + 1]),
            scale=0.125,
            window=None,
        )
        assert torch.equal(alone[0], together[i])
