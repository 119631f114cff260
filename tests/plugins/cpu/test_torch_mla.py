"""What is particular to the torch offers of `mla.*`; their answers: tests/core/ops/test_mla_offers."""

from __future__ import annotations

import cache_checks
import latent_checks as check
import pytest
import torch

from grpo_core.ops.attention import CacheSpec
from grpo_cpu import mla, mla_absorbed
from grpo_cpu.mla_absorbed import decode
from grpo_cpu.mla_cache import SharedLatentCache


def make(spec: CacheSpec) -> SharedLatentCache:
    return SharedLatentCache(check.latent_spec(spec))


def model(dtype: torch.dtype) -> check.LatentModel:
    cache = make(cache_checks.spec(dtype))
    return check.LatentModel(cache=cache, decode=decode, prefill=mla.prefill, dtype=dtype)


def test_prefills_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mla, mla_absorbed):
        monkeypatch.setattr(module, "SCORES", 500)
    check.check_long_prefills(model(torch.float64))


def test_few_new_tokens_are_absorbed_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    absorbed = mla.absorbed
    monkeypatch.setattr(mla, "absorbed", lambda q, *rest: counts.append(len(q)) or absorbed(q, *rest))
    check.check_long_prefills(model(torch.float64))
    # 2 L - N - E = 26 more products for each query and key, L (N + E) = 280 fewer for each key.
    assert counts and max(counts) <= 280 // 26


def test_a_batch_without_sequences() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    cache = make(cache_checks.spec(torch.float32))
    q_nope, q_rope = torch.zeros(0, check.H, check.N), torch.zeros(0, check.H, check.R)
    w_uk, w_uv = check.weights(torch.float32)
    common = {"slots": empty, "seqlens_k": empty, "scale": 1.0}
    o = decode(q_nope, q_rope, cache.layers[0], w_uk, w_uv, **common)
    assert o.shape == (0, check.H, check.E)
    ends = torch.zeros(1, dtype=torch.int32)
    o = mla.prefill(q_nope, q_rope, cache.layers[0], w_uk, w_uv, cu_seqlens_q=ends, **common)
    assert o.shape == (0, check.H, check.E)


def test_prefixes_are_stored_once() -> None:
    """A prompt and its 16 forks fit in a cache that has room for the prompt once."""
    cache = SharedLatentCache(
        check.latent_spec(cache_checks.spec(torch.float32, max_slots=17, max_tokens=100 + 16))
    )
    parent = cache.allocate(100)
    assert parent is not None
    assert all(cache.fork(parent, prefix=100, length=1) is not None for _ in range(16))


def test_a_bfloat16_decode_was_off_by_three_times_its_last_rounding() -> None:
    """Sizes of Moonlight. With absorbed queries and scores in bfloat16 the error was 0.0046 of the result."""
    generator = torch.Generator().manual_seed(0)
    H, N, R, E, L, S = 16, 128, 64, 128, 512, 200

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    cache = SharedLatentCache(
        CacheSpec(
            num_layers=1, num_key_value_heads=1, head_dim=L + R, v_head_dim=L, dtype=torch.bfloat16,
            device=torch.device("cpu"), max_slots=2, max_tokens=S,
        )
    )  # fmt: skip
    slot = cache.allocate(S)
    assert slot is not None
    latent, k_rope, q_nope, q_rope = draw(S, L), draw(S, R), draw(1, H, N), draw(1, H, R)
    w_uk, w_uv = draw(H, N, L, scale=L**-0.5), draw(H, E, L, scale=L**-0.5)
    layer = cache.layers[0]
    layer.write(latent, k_rope, slots_T=torch.full((S,), slot), positions_T=torch.arange(S))
    scale = (N + R) ** -0.5
    got = decode(
        q_nope,
        q_rope,
        layer,
        w_uk,
        w_uv,
        seqlens_k=torch.tensor([S]),
        slots=torch.tensor([slot]),
        scale=scale,
    )
    k = torch.cat(
        [
            torch.einsum("sl,hnl->hsn", latent.double(), w_uk.double()),
            k_rope.double().expand(H, S, R),
        ],
        -1,
    )
    scores = torch.einsum("hd,hsd->hs", torch.cat([q_nope, q_rope], -1)[0].double(), k)
    v = torch.einsum("sl,hel->hse", latent.double(), w_uv.double())
    wanted = torch.einsum("hs,hse->he", (scores * scale).softmax(-1), v)
    # The result itself is rounded: 2^-9 / sqrt(3) of each number.
    assert (got[0].double() - wanted).norm() / wanted.norm() < 2.0**-9
