"""Pages of the CUDA plugin and what reads them: torch as it is, kernels over their documented formulas."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import attention_formulas as vendor
import cache_checks
import op_checks
import op_oracles as oracle
import pytest
import torch

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.common import Common
from grpo_core.ops.reference.pages import PageTable
from grpo_cuda import plain
from grpo_cuda.bits import any_order
from grpo_cuda.cache import PAGE, PagedCache

KERNELS = ("flash", "varlen")


@pytest.fixture(scope="module")
def readers() -> dict[str, ModuleType]:
    return {"plain": plain, **{name: vendor.adapter(name) for name in KERNELS}}


def model(module: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> cache_checks.Model:
    if module is not plain:
        # The kernels want heads in eights, and keys and values of one size.
        monkeypatch.setattr(cache_checks, "E", cache_checks.D)
    return cache_checks.Model(
        cache=PagedCache(cache_checks.spec(dtype, max_tokens=400)), decode=module.decode,
        prefill=module.prefill, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["plain", *KERNELS])
def test_generation_over_pages(
    readers: dict[str, ModuleType], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_checks.check_generation(model(readers[name], dtype, monkeypatch))
    cache_checks.check_a_slot_used_again(model(readers[name], dtype, monkeypatch))


@pytest.mark.parametrize("name", ["plain", *KERNELS])
def test_the_life_of_a_cache(
    readers: dict[str, ModuleType], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_checks.check_release(model(readers[name], torch.float32, monkeypatch))


def test_room_and_misuse() -> None:
    cache_checks.check_room(PagedCache)
    cache_checks.check_misuse(PagedCache)
    cache_checks.check_writes_stay_in_their_room(PagedCache)


def one(max_tokens: int = 2000) -> PagedCache:
    return PagedCache(
        CacheSpec(
            num_layers=2, num_key_value_heads=1, head_dim=16, v_head_dim=16, dtype=torch.float32,
            device=torch.device("cpu"), max_slots=6, max_tokens=max_tokens,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", ["plain", *KERNELS])
@pytest.mark.parametrize("prefix", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_forks_in_the_middle_of_a_page_and_at_its_end(
    readers: dict[str, ModuleType], name: str, prefix: int
) -> None:
    cache = one()
    parent = cache.allocate(prefix)
    assert parent is not None
    q, k, v = op_checks.qkv(prefix + 3, 2, 1, 16, 16, torch.float32)
    at = torch.arange(prefix + 3)
    layer = cache.layers[1]
    layer.write(k[:prefix], v[:prefix], slots_T=torch.full((prefix,), parent), positions_T=at[:prefix])
    children = [cache.fork(parent, prefix=prefix, length=3) for _ in range(2)]
    assert None not in children
    for sign, child in zip((1, -1), children, strict=True):
        layer.write(sign * k[prefix:], v[prefix:], slots_T=torch.full((3,), child), positions_T=at[prefix:])
    cache.free(parent)
    arguments: dict[str, Any] = {"scale": 0.1, "window": None}
    read = readers[name]
    both = torch.tensor(children)
    got = read.decode(
        q[-1:].repeat(2, 1, 1), layer, slots=both, seqlens_k=torch.full((2,), prefix + 3), **arguments
    )
    last = read.prefill(
        q[-3:], layer, slots=both, seqlens_k=torch.full((2,), prefix + 3),
        cu_seqlens_q=torch.tensor([0, 3, 3], dtype=torch.int32), **arguments,
    )  # fmt: skip
    wanted = []
    for sign in (1, -1):
        keys = torch.cat([k[:prefix], sign * k[prefix:]])
        wanted.append(
            oracle.attention(q, keys, v, lengths=[prefix + 3], parents=[-1], causal=True, **arguments)
        )
    oracle.assert_close([got, last], [torch.stack([x[-1] for x in wanted]), wanted[0][-3:]], torch.float32)


@pytest.mark.parametrize("name", ["plain", *KERNELS])
def test_layers_of_a_pass_share_what_they_read(readers: dict[str, ModuleType], name: str) -> None:
    """Told of the lengths on the host, a step asks the device for nothing but its rows' bounds."""
    cache = one()
    slots = torch.tensor([cache.allocate(300), cache.allocate(20)])
    q, k, v = op_checks.qkv(2, 2, 1, 16, 16, torch.float32)
    filled = [torch.arange(300), torch.arange(20)]
    for layer in cache.layers:
        for slot, at in zip(slots.tolist(), filled, strict=True):
            rows = torch.randn(len(at), 1, 16, generator=torch.Generator().manual_seed(slot))
            layer.write(rows, -rows, slots_T=torch.full_like(at, slot), positions_T=at)
    common = Common(seqlens_k=[300, 20], max_seqlen_k=300)
    arguments: dict[str, Any] = {"slots": slots, "seqlens_k": torch.tensor([300, 20]), "scale": 0.3}
    outputs = []
    for layer in cache.layers:
        layer.write(k, v, slots_T=slots, positions_T=torch.tensor([299, 19]))
        kept = readers[name].decode(q, layer, **arguments, window=None, common=common)
        outputs.append(kept)
        assert torch.equal(kept, readers[name].decode(q, layer, **arguments, window=None))
    assert torch.equal(*outputs)
    reading = cache.layers[0].reading(slots, arguments["seqlens_k"], common)
    assert reading is cache.layers[1].reading(slots, arguments["seqlens_k"], common)
    assert reading.room == 2 * PAGE and reading.blocks_BW.dtype == torch.int32
    # A bound of all replays of a graph makes the table wide once and for all.
    wide = cache.layers[0].reading(slots, arguments["seqlens_k"], Common(max_seqlen_k=5 * PAGE - 1))
    assert wide.blocks_BW.shape == (2, 5)


def test_writes_go_without_torchs_sorting_and_leave_its_setting() -> None:
    for warn in (True, False):
        torch.use_deterministic_algorithms(True, warn_only=warn)
        try:
            with pytest.raises(KeyError), any_order():
                assert not torch.are_deterministic_algorithms_enabled()
                raise KeyError
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn
        finally:
            torch.use_deterministic_algorithms(False)
    with any_order():
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_cache_of_another_offer_is_refused(readers: dict[str, ModuleType]) -> None:
    from grpo_core.ops.reference.attention import DenseCache

    layer = DenseCache(cache_checks.spec(torch.float32)).layers[0]
    for name in ("plain", *KERNELS):
        with pytest.raises(TypeError, match="DenseLayer"):
            readers[name].decode(
                torch.zeros(0, 6, 8), layer, seqlens_k=torch.zeros(0), slots=torch.zeros(0), scale=1.0,
                window=None,
            )  # fmt: skip


@pytest.mark.parametrize("inference", [True, False])
def test_rows_are_looked_up_once_a_pass(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine counts its positions up in place: the next pass must see it, and its bounds."""
    cache = one()
    slots = torch.tensor([cache.allocate(5)])
    asked: list[int] = []
    look = PageTable.rows
    monkeypatch.setattr(PageTable, "rows", lambda self, s, p: asked.append(int(p[0])) or look(self, s, p))
    with torch.inference_mode(inference):
        positions = torch.zeros(1, dtype=torch.int64)
        for at in range(5):
            for layer in cache.layers:
                full = torch.full((1, 1, 16), 10.0 * at)
                layer.write(full, full, slots_T=slots, positions_T=positions)
            positions += 1
        with pytest.raises(IndexError, match="no room"):
            cache.layers[0].write(full, full, slots_T=slots, positions_T=positions)
    assert asked == [0, 1, 2, 3, 4, 5]
    reading = cache.layers[1].reading(slots, torch.tensor([5]), None)
    page = int(reading.blocks_BW[0, 0])
    for layer in cache.layers:
        assert layer.k_PSKD[page, :5, 0, 0].tolist() == [0, 10, 20, 30, 40]


def test_rows_are_looked_up_again_when_slots_change() -> None:
    cache = one()
    slots, positions = torch.tensor([0]), torch.tensor([0])
    ones = torch.ones(1, 1, 16)
    assert cache.allocate(1) == 0
    cache.layers[0].write(ones, ones, slots_T=slots, positions_T=positions)
    cache.free(0)
    with pytest.raises(IndexError):
        cache.layers[1].write(ones, ones, slots_T=slots, positions_T=torch.tensor([300]))
    first, second = cache.allocate(300), cache.allocate(1)
    assert first == 0 and second == 1
    cache.layers[1].write(ones, ones, slots_T=slots, positions_T=positions)
    assert int(cache.layers[1].k_PSKD.count_nonzero()) == 16
