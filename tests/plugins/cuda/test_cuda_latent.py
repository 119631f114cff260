"""Latent attention of the CUDA plugin: torch's forms as they are, kernels by their documented formulas."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cache_checks
import expert_formulas as vendor
import latent_checks as check
import pytest
import torch

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.common import Common
from grpo_cuda import mla
from grpo_cuda.mla_cache import LatentPageCache

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KERNELS = ("mla_flash", "mla_varlen", "mla_engine")
SIZES = {
    "usual": (3, 8, 8, 8, 20),
    "deepseek": (2, 128, 64, 128, 40),
    "values wider than keys": (2, 8, 8, 24, 20),
    "the widest": (1, 192, 64, 256, 24),
    "one head": (1, 8, 8, 8, 8),
}
"""Heads, sizes without and with rotary, of values, rank. Multiples of 8, as the kernels want them."""


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    return vendor.adapters(*KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.TREES)
def test_varlen_in_sdpa(case: str, dtype: torch.dtype) -> None:
    lengths, parents = check.TREES[case]
    check.check_varlen(mla.varlen, dtype, lengths, parents)
    if max(parents) < 0:
        check.check_varlen(mla.varlen, dtype, lengths, None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_varlen_in_kernels(kernels: SimpleNamespace, name: str, size: str) -> None:
    _, nope, rope, value, _ = SIZES[size]
    impl = getattr(kernels, name).varlen
    if name == "mla_engine" and value > nope + rope:
        pytest.skip("refused by the offer")
    for lengths, parents in check.TREES.values():
        check.check_varlen(impl, torch.float32, lengths, parents, SIZES[size])
    check.check_varlen(impl, torch.float32, [5, 1, 7], None, SIZES[size])


def test_sequences_stay_apart() -> None:
    check.check_isolation(mla.varlen, torch.float32, SIZES["usual"])


def make(spec: CacheSpec) -> LatentPageCache:
    return LatentPageCache(check.latent_spec(spec))


def model(dtype: torch.dtype, decode: Any, prefill: Any, max_tokens: int = 200) -> check.LatentModel:
    cache = make(cache_checks.spec(dtype, max_tokens=max_tokens))
    return check.LatentModel(cache=cache, decode=decode, prefill=prefill, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_generation(dtype: torch.dtype) -> None:
    cache_checks.check_generation(model(dtype, mla.decode, mla.prefill))
    cache_checks.check_a_slot_used_again(model(dtype, mla.decode, mla.prefill))
    check.check_long_prefills(model(dtype, mla.decode, mla.prefill))


@pytest.mark.parametrize("name", ["mla_flash", "mla_varlen"])
def test_prompts_in_kernels(kernels: SimpleNamespace, name: str) -> None:
    """Heads of 8, the least that the kernels take."""
    sizes = SIZES["usual"]
    spec = cache_checks.spec(torch.float32)
    cache = LatentPageCache(
        CacheSpec(
            num_layers=2, num_key_value_heads=1, head_dim=sizes[4] + sizes[2], v_head_dim=sizes[4],
            dtype=spec.dtype, device=spec.device, max_slots=spec.max_slots, max_tokens=spec.max_tokens,
        )
    )  # fmt: skip
    prefill = getattr(kernels, name).prefill
    cache_checks.check_generation(
        check.LatentModel(cache=cache, decode=mla.decode, prefill=prefill, dtype=torch.float32, sizes=sizes)
    )


@pytest.mark.parametrize("year", [2025, 2026])
def test_flash_mla(year: int) -> None:
    decode = vendor.adapters("mla_flashmla", flash_mla=year).mla_flashmla.decode
    cache_checks.check_generation(model(torch.float32, decode, mla.prefill))


def test_flash_mla_gets_its_own_sizes_and_one_record_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = vendor.adapters("mla_flashmla").mla_flashmla.decode
    monkeypatch.setitem(vendor.STRICT, "sizes", True)
    cache = LatentPageCache(
        CacheSpec(
            num_layers=2, num_key_value_heads=1, head_dim=576, v_head_dim=512, dtype=torch.float32,
            device=torch.device("cpu"), max_slots=2, max_tokens=80,
        )
    )  # fmt: skip
    slot = cache.allocate(70)
    assert slot is not None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(70, 576, generator=generator)
    w_uk, w_uv = check.weights(torch.float32, (4, 16, 24, 512))
    q_nope, q_rope = (torch.randn(1, 4, size, generator=generator) for size in (16, 64))
    given = {"seqlens_k": torch.tensor([70]), "slots": torch.tensor([slot]), "scale": 0.1}
    common = Common(seqlens_k=[70], max_seqlen_k=70)
    vendor.CALLS.clear()
    for layer in cache.layers:
        at = {"slots_T": torch.full((70,), slot), "positions_T": torch.arange(70)}
        layer.write(*rows.split([512, 64], 1), **at)
        got = decode(q_nope, q_rope, layer, w_uk, w_uv, common=common, **given)
        wanted = mla.decode(
            *(x.double() for x in (q_nope, q_rope)), layer, w_uk.double(), w_uv.double(), **given
        )
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert len(vendor.CALLS) == 1
    empty = torch.zeros(0, dtype=torch.int64)
    o = decode(q_nope[:0], q_rope[:0], layer, w_uk, w_uv, seqlens_k=empty, slots=empty, scale=1.0)
    assert o.shape == (0, 4, 24)


def test_cache() -> None:
    cache_checks.check_room(make)
    check.check_bad_specs(LatentPageCache)
    check.check_writes_stay_in_their_room(make)


def test_a_page_that_a_prompt_ends_in_is_copied_and_full_ones_are_shared() -> None:
    cache = make(cache_checks.spec(torch.float32, max_slots=4, max_tokens=300))
    parent = cache.allocate(70)
    assert parent is not None
    child = cache.fork(parent, prefix=70, length=4)
    assert child is not None
    pages = cache.table.pages_SP
    assert pages[parent, 0] == pages[child, 0] and pages[parent, 1] != pages[child, 1]
    cache.free(child)
    cache.free(parent)
    cache.release()
    assert cache.nbytes() == 0
    cache.restore()
    assert cache.layers[0].k_PSKD.shape[1:] == (64, 1, check.L + check.R)


def test_layers_of_another_cache_are_refused() -> None:
    with pytest.raises(TypeError, match="LatentPageCache"):
        mla.decode(
            torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), object(), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4),
            seqlens_k=torch.tensor([1]), slots=torch.tensor([0]), scale=1.0,
        )  # type: ignore[arg-type]  # fmt: skip


def test_later_layers_read_no_lengths_from_the_device(kernels: SimpleNamespace) -> None:
    """Their lengths could say anything."""
    heads, nope, rope, _, latent = sizes = SIZES["usual"]
    spec = cache_checks.spec(torch.float32)
    cache = LatentPageCache(replace(spec, num_key_value_heads=1, head_dim=latent + rope, v_head_dim=latent))
    slots = [cache.allocate(90), cache.allocate(30)]
    numbers = torch.tensor(slots)
    w_uk, w_uv = check.weights(torch.float32, (heads, nope, sizes[3], latent))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(120, latent + rope, generator=draw)
    at = {"slots_T": numbers.repeat_interleave(torch.tensor([90, 30])),
          "positions_T": torch.cat([torch.arange(90), torch.arange(30)])}  # fmt: skip
    for layer in cache.layers:
        layer.write(*rows.split([latent, rope], 1), **at)
    q = torch.randn(9, heads, nope + rope, generator=draw).split([nope, rope], -1)
    used, ends = torch.tensor([90, 30]), torch.tensor([0, 2, 9], dtype=torch.int32)
    last = [x[:2] for x in q]
    weights: dict[str, Any] = {"scale": 0.3, "slots": numbers}
    for prefill in (mla.prefill, kernels.mla_flash.prefill):
        common = Common(cu_seqlens=[0, 2, 9], seqlens_k=[90, 30], max_seqlen_k=90)
        wanted = prefill(*q, cache.layers[0], w_uk, w_uv, cu_seqlens_q=ends, seqlens_k=used, **weights)
        for lengths in ((ends, used), (ends * 0, used * 0)):
            got = prefill(*q, cache.layers[1], w_uk, w_uv, cu_seqlens_q=lengths[0], seqlens_k=lengths[1],
                          common=common, **weights)  # fmt: skip
            assert torch.equal(got, wanted)
    common = Common(seqlens_k=[90, 30], max_seqlen_k=100)
    wanted = mla.decode(*last, cache.layers[0], w_uk, w_uv, seqlens_k=used, **weights)
    got = mla.decode(*last, cache.layers[1], w_uk, w_uv, seqlens_k=used, common=common, **weights)
    torch.testing.assert_close(got, wanted)
