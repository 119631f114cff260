"""mla.varlen and mla.prefill of the C++ pack, with heads that are multiples of 32."""

from __future__ import annotations

from dataclasses import replace

import cache_checks
import latent_checks as check
import pytest
import torch
import transformer_mixers

from grpo_core.impl import DeviceInfo, Need
from grpo_cpu import native
from grpo_cpu.native_offers import refuse_mla

if "avx512_bf16" not in native.cpu_flags() or native.compiler() is None:
    pytest.skip("needs AVX512-BF16 and a C++ compiler", allow_module_level=True)

from grpo_cpu import native_mla
from grpo_cpu.mla_absorbed import decode
from grpo_cpu.mla_cache import SharedLatentCache

SIZES = (3, 16, 16, 64, 24)
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.TREES)
def test_varlen_with_parents(case: str, dtype: torch.dtype) -> None:
    check.check_varlen(native_mla.varlen, dtype, *check.TREES[case], sizes=SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_without_parents(dtype: torch.dtype) -> None:
    check.check_varlen(native_mla.varlen, dtype, [40, 0, 70], None, sizes=SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_isolation(dtype: torch.dtype) -> None:
    check.check_isolation(native_mla.varlen, dtype, SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_generation_and_long_prefills(dtype: torch.dtype) -> None:
    spec = replace(cache_checks.spec(dtype), num_key_value_heads=1, head_dim=40, v_head_dim=24)
    for run in (cache_checks.check_generation, check.check_long_prefills):
        run(
            check.LatentModel(
                cache=SharedLatentCache(spec), decode=decode, prefill=native_mla.prefill,
                dtype=dtype, sizes=SIZES,
            )
        )  # fmt: skip


def test_heads_that_the_kernels_lack_are_refused() -> None:
    info = DeviceInfo(type="cpu", features=frozenset({"avx512_bf16", "compiler"}))
    for nope, rope, fits in ((128, 64, True), (16, 16, True), (128, 16, False), (256, 64, False)):
        need = Need(op="mla.varlen", facts={"qk_nope_head_dim": nope, "qk_rope_head_dim": rope})
        reason = refuse_mla(info, need)
        assert (reason is None) == fits
        assert reason is None or str(nope + rope) in reason
    assert "compiler" in str(refuse_mla(DeviceInfo(type="cpu", features=frozenset({"avx512_bf16"})), need))


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_equals_deepseek_v3_of_transformers(dtype: torch.dtype) -> None:
    transformer_mixers.check_deepseek(native_mla.varlen, dtype)
