"""The Ascend plugin over the real torch-npu, where its tests on a CPU have a stand-in for the package."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grpo_ascend.device import ASCEND
from grpo_core.errors import PluginError

npu = "npu:0"


def test_the_device_is_set_up_before_its_first_op() -> None:
    import torch_npu

    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch_npu.npu.is_jit_compile_false()
    assert not torch_npu.npu.conv.allow_hf32, "by default float32 convolutions have fewer bits"
    assert not torch_npu.npu.matmul.allow_hf32
    assert torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT").decode() == "disable"


def test_an_npu_that_is_not_there_is_refused() -> None:
    count = torch.npu.device_count()
    with pytest.raises(PluginError, match=f"ascend:{count} cannot be opened"):
        ASCEND.open(count)


def test_seed_and_state_of_the_generators() -> None:
    def draw() -> list[Tensor]:
        return [torch.randn(5, device=npu).cpu(), torch.rand(3)]

    ASCEND.seed(7)
    first = draw()
    ASCEND.seed(8)
    assert not torch.equal(draw()[0], first[0])
    ASCEND.seed(7 + 2**64)
    assert all(map(torch.equal, draw(), first)), "the low 64 bits count"
    state = ASCEND.rng_state()
    assert state.dtype == torch.uint8 and state.device.type == "cpu"
    second = torch.randn(5, device=npu).cpu()
    ASCEND.set_rng_state(state)
    assert torch.equal(torch.randn(5, device=npu).cpu(), second)


def test_memory_is_the_allocators_and_sleeping_tags_give_it_back(tmp_path: Path) -> None:
    from grpo_ascend.memory import NpuMemory

    memory = NpuMemory()
    gc.collect()
    before = memory.stats()
    weights, cache = (torch.full((1 << 20,), value, device=npu) for value in (1.5, 2.5))
    memory.hold("weights", [weights, weights[3:]])
    memory.hold("cache", [cache])
    full = memory.stats()
    assert full.allocated - before.allocated >= 8 << 20
    assert full.reserved >= full.allocated and full.peak >= full.allocated
    assert full.by_tag == {"weights": 4 << 20, "cache": 4 << 20}
    memory.sleep("weights", keep="host")
    memory.sleep("cache", keep="none")
    asleep = memory.stats()
    assert asleep.allocated <= full.allocated - (8 << 20)
    assert asleep.reserved < full.reserved, "another process of this NPU is to have the room"
    memory.wake("weights", "cache")
    assert weights.cpu().eq(1.5).all() and cache.cpu().eq(0).all()
    assert memory.stats().allocated == full.allocated
    memory.sleep("weights", keep="disk")
    memory.wake("weights")
    assert weights[3:].cpu().eq(1.5).all()
    memory.reset_peak()
    assert memory.stats().peak == memory.stats().allocated


def test_running_out_raises_torchs_own_error_and_leaves_room() -> None:
    _, total = torch.npu.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(total + (1 << 30), dtype=torch.uint8, device=npu)
    assert torch.ones(1 << 20, device=npu).sum().item() == 1 << 20


def test_training_goes_on_after_a_rollout_asked_for_the_mask() -> None:
    """Autograd refuses to save tensors of inference mode."""
    from grpo_ascend import fusion

    fusion.causal_mask.cache_clear()
    torch.manual_seed(0)
    q = torch.randn(7, 2, 8).to(npu).requires_grad_()
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=npu)
    words = {"max_seqlen": 4, "scale": 0.5, "causal": True, "window": None}
    with torch.inference_mode():
        fusion.varlen(q.detach(), q.detach(), q.detach(), cu_seqlens=cu.clone(), **words)
    fusion.varlen(q, q, q, cu_seqlens=cu, **words).square().sum().backward()
    assert q.grad is not None and bool(q.grad.cpu().abs().sum() > 0)


def test_work_of_another_stream_is_waited_for() -> None:
    stream, event = torch.npu.Stream(), torch.npu.Event()
    x = torch.ones(1 << 16, device=npu)
    stream.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(stream):
        y = x * 3
        event.record(stream)
    event.synchronize()
    torch.npu.current_stream().wait_stream(stream)
    ASCEND.synchronize()
    assert event.query() and y.sum().item() == 3 << 16
