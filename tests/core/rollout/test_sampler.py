"""Random streams and the sampler around `sample.token`."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.ops.reference.fused import sample_token
from grpo_core.rollout.sampler import TokenSampler, in_float32, stream_keys, uniforms
from grpo_core.types import Sampling

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """One output of SplitMix64 in Python integers (Vigna's reference code)."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix_matches_its_published_sequence() -> None:
    # First outputs for seed 1234567 as published with the reference code.
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), count=st.integers(0, 2**31))
def test_uniforms_are_splitmix_of_a_mixed_seed(seed: int, count: int) -> None:
    key = stream_keys([seed])
    expected = splitmix((int(key[0]) + 0x9E3779B97F4A7C15 * count) & MASK) >> 11
    assert uniforms(key, np.array([count]))[0] == expected * 2.0**-53


def test_uniforms_are_uniform_and_independent_of_neighbours() -> None:
    keys = stream_keys(range(400))
    u = np.stack([uniforms(keys, np.full(400, t)) for t in range(250)])
    assert u.min() >= 0 and u.max() < 1
    # 1e5 draws: the mean has a standard error of 9e-4, a correlation one of 3e-3; five of them.
    assert abs(u.mean() - 0.5) < 5 * 9.2e-4
    assert abs(u.var() - 1 / 12) < 1e-3
    centred = u - u.mean()
    for other in (np.roll(centred, 1, axis=0), np.roll(centred, 1, axis=1)):
        assert abs((centred * other).mean() / centred.var()) < 5 * 3.2e-3
    counts, _ = np.histogram(u, bins=64, range=(0, 1))
    chi2 = ((counts - u.size / 64) ** 2 / (u.size / 64)).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)


def make(sampling: Sampling, stop_ids: frozenset[int], rows: int = 4, vocab: int = 11) -> TokenSampler:
    return TokenSampler(
        sample_token, sampling, stop_ids=stop_ids, vocab_size=vocab, rows=rows, device=torch.device("cpu")
    )


def test_a_device_without_float64_gets_draws_in_float32_that_stay_below_one() -> None:
    seen: list[torch.Tensor] = []

    def op(logits_BV: torch.Tensor, u_B: torch.Tensor, **_: object) -> tuple[torch.Tensor, ...]:
        seen.append(u_B)
        return tuple(torch.zeros(len(u_B)) for _ in range(3))

    keys, counts = stream_keys(range(64)), np.zeros(64, dtype=np.int64)
    for float64 in (True, False):
        TokenSampler(
            op, Sampling(max_tokens=1), stop_ids=frozenset(), vocab_size=3, rows=64,  # type: ignore[arg-type]
            device=torch.device("cpu"), float64=float64,
        )(torch.zeros(64, 3), keys, counts)  # fmt: skip
    wide, narrow = seen
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
    assert ((wide - narrow.double()) >= 0).all() and (wide - narrow.double()).max() < 2**-24
    assert in_float32(np.array([1 - 2.0**-53, 0.0]))[0] < 1


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(3))
    sampler = make(Sampling(max_tokens=1), frozenset(), rows=20000, vocab=7)
    ids, logprob, logprob1 = sampler(
        logits.repeat(20000, 1), stream_keys(range(20000)), np.zeros(20000, dtype=np.int64)
    )
    probs = logits[0].softmax(-1)
    found = torch.bincount(ids, minlength=7) / 20000
    # Five standard errors of a binomial share.
    assert ((found - probs).abs() < 5 * (probs * (1 - probs) / 20000).sqrt()).all()
    assert torch.allclose(logprob, probs.log()[ids], atol=1e-6)
    assert torch.equal(logprob, logprob1)


def test_only_rows_below_min_tokens_are_held_back() -> None:
    logits = torch.zeros(4, 11)
    logits[:, 5] = 20.0
    sampler = make(Sampling(max_tokens=9, min_tokens=2, temperature=0.0), frozenset({5, 70}))
    ids, _, _ = sampler(logits.clone(), stream_keys(range(4)), np.array([0, 1, 2, 3]))
    assert ids.tolist() == [0, 0, 5, 5]
    assert sampler.stops.tolist() == [i == 5 for i in range(11)]


def test_logits_are_left_alone_once_min_tokens_are_reached() -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    make(Sampling(max_tokens=9, min_tokens=2), frozenset({5}))(
        logits, stream_keys(range(4)), np.array([2, 3, 4, 5])
    )
    assert torch.equal(logits, before)
