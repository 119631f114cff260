"""Checks of the Triton decode over pages; called where Triton interprets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cache_checks
import op_oracles as oracle
import pytest
import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.common import Common
from grpo_cuda import cache, cache_decode, plain

CACHES = {"small": cache.SmallPageCache, "large": cache.PagedCache}


def generation(decode: Callable[..., Tensor], kind: str, dtype: torch.dtype) -> None:
    """Prompts, forks and windows as an engine makes them; prefill in torch."""
    cache_checks.check_generation(
        cache_checks.Model(
            cache=CACHES[kind](cache_checks.spec(dtype, max_tokens=400)), decode=decode,
            prefill=plain.prefill, dtype=dtype,
        )
    )  # fmt: skip


def life(make: Any) -> None:
    """A cache in small pages, like any other."""
    for check in (cache_checks.check_room, cache_checks.check_misuse,
                  cache_checks.check_writes_stay_in_their_room):  # fmt: skip
        check(make)


def spans(
    decode: Callable[..., Tensor],
    kind: str,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    window: int | None,
) -> None:
    """Sequences that end before, at and after the borders of tiles and spans; one is alone in its bits."""
    lengths = [1, 63, 64, 65, cache_decode.SPAN, cache_decode.SPAN + 1, 2 * cache_decode.SPAN + 7]
    (H, K), (D, E) = heads, sizes
    held = CACHES[kind](
        CacheSpec(
            num_layers=1, num_key_value_heads=K, head_dim=D, v_head_dim=E, dtype=torch.float32,
            device=torch.device("cpu"), max_slots=len(lengths), max_tokens=sum(lengths),
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(lengths), H, D, generator=generator)
    slots, wanted = [], []
    for index, length in enumerate(lengths):
        slot = held.allocate(length)
        assert slot is not None
        k, v = torch.randn(length, K, D, generator=generator), torch.randn(length, K, E, generator=generator)
        at = torch.arange(length)
        held.layers[0].write(k, v, slots_T=torch.full_like(at, slot), positions_T=at)
        padded = torch.cat([torch.zeros(length - 1, H, D), q[index : index + 1]]).double()
        attended = oracle.attention(
            padded, k.double(), v.double(), lengths=[length], parents=[-1], scale=0.3, causal=True,
            window=window,
        )  # fmt: skip
        slots.append(slot)
        wanted.append(attended[-1])

    def run(rows: list[int], common: Common | None = None) -> Tensor:
        return decode(
            q[rows], held.layers[0], slots=torch.tensor(slots)[rows],
            seqlens_k=torch.tensor(lengths)[rows], scale=0.3, window=window, common=common,
        )  # fmt: skip

    every = list(range(len(lengths)))
    together = run(every)
    oracle.assert_close([together], [torch.stack(wanted)], torch.float32)
    for row in (0, 3, 5):
        assert torch.equal(run([row])[0], together[row])
    bound = Common(max_seqlen_k=5 * cache_decode.SPAN)
    assert torch.equal(run(every, bound), together)
    assert run([]).shape == (0, H, E)


def unwritten(decode: Callable[..., Tensor]) -> None:
    """What lies behind the end of a sequence, in its last page and in others', is not seen."""
    for kind, make in CACHES.items():
        held = make(
            CacheSpec(
                num_layers=1, num_key_value_heads=1, head_dim=16, v_head_dim=16, dtype=torch.float32,
                device=torch.device("cpu"), max_slots=2, max_tokens=60,
            )
        )  # fmt: skip
        layer = held.layers[0]
        layer.k_PSKD.fill_(torch.nan)
        layer.v_PSKE.fill_(torch.nan)
        slot, at = held.allocate(21), torch.arange(21)
        layer.write(
            torch.ones(21, 1, 16), torch.ones(21, 1, 16), slots_T=torch.full((21,), slot), positions_T=at
        )
        out = decode(
            torch.ones(1, 2, 16), layer, slots=torch.tensor([slot]), seqlens_k=torch.tensor([21]), scale=1.0,
            window=None, common=Common(max_seqlen_k=60),
        )  # fmt: skip
        torch.testing.assert_close(out, torch.ones_like(out)), kind


def refusals(decode: Callable[..., Tensor]) -> None:
    from grpo_core.ops.reference.attention import DenseCache

    layer = DenseCache(cache_checks.spec(torch.float32)).layers[0]
    nothing = torch.zeros(0)
    with pytest.raises(TypeError, match="DenseLayer"):
        decode(torch.zeros(0, 6, 8), layer, seqlens_k=nothing, slots=nothing, scale=1.0, window=None)
