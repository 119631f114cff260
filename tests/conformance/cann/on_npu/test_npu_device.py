"""torch_npu's own memory, streams, generators and dispatch over the simulated CANN."""

from __future__ import annotations

import gc

import pytest
import torch

npu = "npu:0"


def test_the_vendors_package_sees_its_devices() -> None:
    import torch_npu

    assert torch.npu.is_available() and torch.npu.device_count() == 2
    assert torch.npu.get_device_name() == "Ascend910B3"
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert not torch_npu._C._npu_is_support_inf_nan or torch_npu.__version__.startswith("2.")


def test_numbers_are_the_cpus() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    x, y = a.to(npu), b.to(npu)
    for got, want in (
        (x @ y, a @ b), (x.softmax(-1), a.softmax(-1)), (x.sum(0), a.sum(0)),
        (x[:, 2:].t() * 2, a[:, 2:].t() * 2),
        (torch.cat([x, x], 1), torch.cat([a, a], 1)), (x.argmax(-1), a.argmax(-1)), (x[x > 0], a[a > 0]),
        (x.to(torch.bfloat16).float(), a.to(torch.bfloat16).float()), (x.cumsum(1), a.cumsum(1)),
        (torch.nn.functional.pad(x, (1, 2)), torch.nn.functional.pad(a, (1, 2))), (x.flip(0), a.flip(0)),
        (torch.arange(6, device=npu).view(2, 3).repeat(2, 1), torch.arange(6).view(2, 3).repeat(2, 1)),
    ):  # fmt: skip
        assert str(got.device) == npu
        torch.testing.assert_close(got.cpu(), want)
    assert x.sum().item() == a.sum().item() and bool((x == x).all())


def test_in_place_views_and_out_arguments_write_the_npus_memory() -> None:
    x = torch.zeros(4, 4, device=npu)
    x[1:3, ::2] += 5
    x.t()[3].fill_(2)
    torch.mul(x, 3, out=x)
    want = torch.zeros(4, 4)
    want[1:3, ::2] += 5
    want.t()[3].fill_(2)
    assert torch.equal(x.cpu(), want * 3)
    grown = torch.empty(0, device=npu)
    torch.add(x, 1, out=grown)
    assert torch.equal(grown.cpu(), want * 3 + 1)
    x.index_put_((torch.tensor([0, 1]), torch.tensor([0, 1])), torch.tensor([7.0, 8.0], device=npu))
    assert x[0, 0].item() == 7 and x[1, 1].item() == 8


def test_operands_of_the_host_are_refused() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=npu) + torch.ones(2)
    assert (torch.ones(2, device=npu) + torch.tensor(1.0)).cpu().tolist() == [2.0, 2.0]


def test_gradients_come_from_the_vendors_own_autograd() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
    twin = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).to(npu)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 6)
    for module, given in ((model, x), (twin, x.to(npu))):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=str(given.device) == npu)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                module(given), torch.zeros(5, dtype=torch.long, device=given.device)
            ).backward()
            optimizer.step()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


def test_the_vendors_allocator_counts() -> None:
    gc.collect()
    before = torch.npu.memory_allocated()
    x = torch.ones(1 << 20, device=npu)
    assert torch.npu.memory_allocated() - before in range(4 << 20, (4 << 20) + 1024)
    assert torch.npu.mem_get_info()[1] == 4 << 30
    del x
    assert torch.npu.memory_allocated() == before
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(5 << 30, dtype=torch.uint8, device=npu)


def test_memory_nobody_has_written_is_nan() -> None:
    torch.npu.empty_cache()
    assert torch.empty(30 << 20, dtype=torch.uint8, device=npu).view(torch.float32)[:10].isnan().all()


def test_draws_follow_the_npus_generator() -> None:
    torch.npu.manual_seed(3)
    host = torch.get_rng_state()
    first = torch.rand(4, device=npu)
    state = torch.npu.get_rng_state()
    second = torch.nn.functional.dropout(torch.ones(64, device=npu), 0.5)
    third = torch.randn(4, device=npu)
    assert torch.equal(torch.get_rng_state(), host)  # nothing is drawn from the host's
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64, device=npu), 0.5), second)
    assert torch.equal(torch.randn(4, device=npu), third)
    torch.npu.manual_seed(3)
    assert torch.equal(torch.rand(4, device=npu), first) and not torch.equal(torch.rand(4, device=npu), first)
    assert 0.3 < second.eq(0).float().mean().item() < 0.7


def test_streams_and_events() -> None:
    stream, begin, end = (
        torch.npu.Stream(),
        torch.npu.Event(enable_timing=True),
        torch.npu.Event(enable_timing=True),
    )
    begin.record()
    with torch.npu.stream(stream):
        x = torch.ones(10, device=npu) * 2
    stream.synchronize()
    end.record()
    assert x.sum().item() == 20 and begin.elapsed_time(end) >= 0 and end.query()


def test_an_operation_without_numbers_says_so() -> None:
    import torch_npu

    with pytest.raises(RuntimeError, match=r"aclnn\w+ is not computed"):
        torch_npu.npu_gelu(torch.ones(3, device=npu), approximate="none")
