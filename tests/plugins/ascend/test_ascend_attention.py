"""The plugin's attention over the vendor's documented formulas, against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cache_checks
import latent_checks
import op_checks
import op_oracles as oracle
import pytest
import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("case", op_checks.LENGTHS)
def test_shared_prefix(ascend: SimpleNamespace, case: str, window: int | None, dtype: torch.dtype) -> None:
    op_checks.check_shared_prefix(ascend.fusion.shared_prefix, case, dtype, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (3, True), (3, False)])
def test_varlen(ascend: SimpleNamespace, window: int | None, causal: bool, dtype: torch.dtype) -> None:
    op_checks.check_varlen(ascend.fusion.varlen, "ragged with an empty sequence", dtype, window, causal)


def test_packing(ascend: SimpleNamespace) -> None:
    op_checks.check_packed_isolation(ascend.fusion.varlen, ascend.fusion.shared_prefix)
    op_checks.check_bad_packing(ascend.fusion.varlen, ascend.fusion.shared_prefix)


def test_more_segments_than_one_call_takes(ascend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend.fusion, "MAX_SEGMENTS", 2)
    op_checks.check_shared_prefix(ascend.fusion.shared_prefix, "groups", torch.float32, None)


def test_more_heads_than_one_call_takes(ascend: SimpleNamespace) -> None:
    q, k, v = op_checks.qkv(6, 300, 150, 8, 8, torch.float32)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    o = ascend.fusion.varlen(
        q, k, v, cu_seqlens=cu_seqlens, max_seqlen=4, scale=1.0, causal=True, window=None
    )
    wanted = oracle.attention(q, k, v, lengths=[2, 4], parents=[-1, -1], scale=1.0, causal=True, window=None)
    oracle.assert_close([o], [wanted], torch.float32)


def test_lengths_that_changed_in_place_are_fetched_again(ascend: SimpleNamespace) -> None:
    q, k, v = op_checks.qkv(6, 2, 2, 8, 8, torch.float32)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)

    def run() -> Tensor:
        return ascend.fusion.varlen(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=6, scale=1.0, causal=True, window=None
        )

    before = run()
    assert torch.equal(run(), before)
    cu_seqlens[1] = 5
    wanted = oracle.attention(q, k, v, lengths=[5, 1], parents=[-1, -1], scale=1.0, causal=True, window=None)
    oracle.assert_close([run()], [wanted], torch.float32)


def test_a_mask_that_a_rollout_asked_for_first_serves_training(ascend: SimpleNamespace) -> None:
    """Autograd refuses to save tensors of inference mode."""
    ascend.fusion.causal_mask.cache_clear()
    with torch.inference_mode():
        ascend.fusion.causal_mask(torch.device("cpu"))
    assert not ascend.fusion.causal_mask(torch.device("cpu")).is_inference()


def attend(ascend: SimpleNamespace, name: str) -> Any:
    """The vendor's op without a window, plain torch over the same cache with one."""

    def call(*args: Any, window: int | None, **rest: Any) -> Tensor:
        module = ascend.infer if window is None else ascend.plain
        return getattr(module, name)(*args, window=window, **rest)

    return call


def model(ascend: SimpleNamespace, dtype: torch.dtype) -> cache_checks.Model:
    return cache_checks.Model(
        cache=ascend.infer.KeyValueCache(cache_checks.spec(dtype, max_tokens=400)),
        decode=attend(ascend, "decode"), prefill=attend(ascend, "prefill"), dtype=dtype,
    )  # fmt: skip


@pytest.mark.usefixtures("small_heads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_generation_over_pages(ascend: SimpleNamespace, dtype: torch.dtype) -> None:
    cache_checks.check_generation(model(ascend, dtype))
    cache_checks.check_a_slot_used_again(model(ascend, dtype))


@pytest.mark.usefixtures("small_heads")
def test_the_life_of_a_cache(ascend: SimpleNamespace) -> None:
    cache_checks.check_release(model(ascend, torch.float32))
    for check in (cache_checks.check_room, cache_checks.check_misuse,
                  cache_checks.check_writes_stay_in_their_room):  # fmt: skip
        check(ascend.infer.KeyValueCache)


def test_forks_in_the_middle_of_a_page_and_at_its_end(ascend: SimpleNamespace) -> None:
    """With heads as the vendor takes them."""
    spec = CacheSpec(
        num_layers=1, num_key_value_heads=1, head_dim=64, v_head_dim=64, dtype=torch.bfloat16,
        device=torch.device("cpu"), max_slots=4, max_tokens=1000,
    )  # fmt: skip
    for prefix in (127, 128, 129, 256):
        cache = ascend.infer.KeyValueCache(spec)
        parent = cache.allocate(prefix)
        q, k, v = op_checks.qkv(prefix + 3, 2, 1, 64, 64, torch.bfloat16)
        at = torch.arange(prefix + 3)
        cache.layers[0].write(
            k[:prefix], v[:prefix], slots_T=torch.full((prefix,), parent), positions_T=at[:prefix]
        )
        child = cache.fork(parent, prefix=prefix, length=3)
        cache.layers[0].write(
            k[prefix:], v[prefix:], slots_T=torch.full((3,), child), positions_T=at[prefix:]
        )
        arguments = {"slots": torch.tensor([child]), "scale": 0.1, "window": None}
        got = ascend.infer.decode(q[-1:], cache.layers[0], seqlens_k=torch.tensor([prefix + 3]), **arguments)
        last = ascend.infer.prefill(
            q[-3:], cache.layers[0], cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32),
            seqlens_k=torch.tensor([prefix + 3]), **arguments,
        )  # fmt: skip
        wanted = oracle.attention(
            q, k, v, lengths=[prefix + 3], parents=[-1], scale=0.1, causal=True, window=None
        )
        oracle.assert_close([got, last], [wanted[-1:], wanted[-3:]], torch.bfloat16)


@pytest.mark.usefixtures("small_heads")
def test_a_step_is_its_parts_and_positions_may_change_between_steps(ascend: SimpleNamespace) -> None:
    """An engine counts its positions up in place; the host must not keep those of the step before."""
    H, K, D, layers = 4, 2, 8, 3
    spec = CacheSpec(
        num_layers=layers, num_key_value_heads=K, head_dim=D, v_head_dim=D, dtype=torch.float32,
        device=torch.device("cpu"), max_slots=2, max_tokens=600,
    )  # fmt: skip
    caches = [ascend.infer.KeyValueCache(spec) for _ in range(2)]
    slots = torch.tensor([cache.allocate(140) for cache in caches[:1]] * 1)
    caches[1].allocate(140)
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(D, generator=generator) + 0.5
    positions = torch.tensor([0])
    with torch.inference_mode():
        for at in range(3):
            angle = torch.rand(1, D // 2, generator=generator)
            for layer in range(layers):
                qkv = torch.randn(1, (H + 2 * K) * D, generator=generator)
                turn = {"cos_BR": angle.cos(), "sin_BR": angle.sin()}
                got = ascend.infer.step(
                    qkv, caches[0].layers[layer], **turn, positions=positions, slots=slots, num_heads=H,
                    scale=0.3, window=None, interleaved=False, q_norm=w, k_norm=w, eps=1e-6,
                )  # fmt: skip
                q, k, v = qkv.view(1, -1, D).split([H, K, K], 1)
                q, k = (ascend.norm.rms_norm(x, w, eps=1e-6, residual=None, zero_centered=False)
                        for x in (q, k))  # fmt: skip
                q, k = ascend.rope.rope_apply(q, k, angle.cos(), angle.sin(), interleaved=False)
                other = caches[1].layers[layer]
                other.write(k, v, slots_T=slots, positions_T=torch.tensor([at]))
                wanted = ascend.plain.decode(
                    q, other, seqlens_k=torch.tensor([at + 1]), slots=slots, scale=0.3, window=None
                )
                torch.testing.assert_close(got, wanted.flatten(1))
            positions += 1


def latent_model(ascend: SimpleNamespace, dtype: torch.dtype) -> latent_checks.LatentModel:
    spec = latent_checks.latent_spec(cache_checks.spec(dtype, max_tokens=400))
    return latent_checks.LatentModel(
        cache=ascend.latent.LatentPageCache(spec), decode=ascend.latent.decode,
        prefill=ascend.latent.prefill, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", latent_checks.TREES)
def test_latent_training(ascend: SimpleNamespace, case: str, dtype: torch.dtype) -> None:
    latent_checks.check_varlen(ascend.latent.varlen, dtype, *latent_checks.TREES[case])
    latent_checks.check_varlen(ascend.latent.varlen, dtype, [5, 0, 7], None)


@pytest.mark.usefixtures("small_heads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_generation_over_pages(ascend: SimpleNamespace, dtype: torch.dtype) -> None:
    cache_checks.check_generation(latent_model(ascend, dtype))
    latent_checks.check_long_prefills(latent_model(ascend, dtype))


@pytest.mark.usefixtures("small_heads")
def test_latent_prefill_and_decode_in_plain_torch(ascend: SimpleNamespace) -> None:
    plain = latent_model(ascend, torch.float32)
    plain.decode, plain.prefill = ascend.plain.mla_decode, ascend.plain.mla_prefill
    cache_checks.check_generation(plain)


def test_latent_caches_refuse_other_sizes(ascend: SimpleNamespace) -> None:
    latent_checks.check_bad_specs(ascend.latent.LatentPageCache)
    latent_checks.check_writes_stay_in_their_room(ascend.latent.LatentPageCache)
