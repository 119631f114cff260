"""What the simulated device does; asked in a process of its own, before whose first backward it registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import grpo_conformance.sim.runtime as runtime
from grpo_conformance.case import Outcome, Target, failed, passed

sim = torch.get_device_module("sim")
ops = runtime.ops


def told(**claims: bool) -> Outcome:
    """A pass where every claim holds; else the names of those that do not."""
    broken = [name for name, holds in claims.items() if not holds]
    return failed(", ".join(broken)) if broken else passed()


def refused(call: Callable[[], object], *words: str, error: type[Exception] = RuntimeError) -> bool:
    try:
        call()
    except error as raised:
        return all(word in str(raised) for word in words)
    return False


@contextmanager
def quirk(name: str) -> Iterator[None]:
    ops.quirk(name, True)
    try:
        yield
    finally:
        ops.quirk(name, False)


def on(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("sim")


def late_copies(target: Target) -> Outcome:
    """A copy to pinned memory is poison until the right stream is synchronised."""
    x, other = on(1000), torch.Stream(device="sim")
    out = torch.empty(1000).pin_memory()
    out.copy_(x, non_blocking=True)
    x.zero_()
    early = bool(out.isnan().all())
    other.synchronize()
    wrong_stream = bool(out.isnan().all())
    sim.current_stream().synchronize()
    also = on(7).to("cpu", non_blocking=True)
    poisoned = bool(also.isnan().all())
    sim.synchronize()
    pageable = torch.zeros(1000)
    pageable.copy_(on(1000), non_blocking=True)
    return told(
        early=early, wrong_stream=wrong_stream, content_of_then=torch.equal(out, on(1000).cpu()),
        to_cpu_is_late=poisoned, to_cpu_lands=torch.equal(also, on(7).cpu()),
        pageable_memory_waits=torch.equal(pageable, on(1000).cpu()), nothing_pending=ops.pending() == 0,
    )  # fmt: skip


def events(target: Target) -> Outcome:
    """Waiting for an event on a stream does not make the host wait; synchronising that stream does."""
    first, second = torch.Stream(device="sim"), torch.Stream(device="sim")
    before, after = torch.Event(device="sim"), torch.Event(device="sim")
    one, two = torch.empty(5).pin_memory(), torch.empty(5).pin_memory()
    with sim.stream(first):
        one.copy_(on(5), non_blocking=True)
        before.record(first)
        two.copy_(on(5), non_blocking=True)
        after.record(first)
    second.wait_event(before)
    host_went_on = bool(one.isnan().all()) and not before.query()
    second.synchronize()
    ordered = not bool(one.isnan().any()) and bool(two.isnan().all())
    after.synchronize()
    return told(
        host_went_on=host_went_on, ordered=ordered, all=torch.equal(two, on(5).cpu()), queried=after.query()
    )


def waits(target: Target) -> Outcome:
    """`item` and a blocking copy finish what their stream has queued."""
    out = torch.empty(3).pin_memory()
    out.copy_(on(3), non_blocking=True)
    on(3).sum().item()
    by_item = not bool(out.isnan().any())
    out.copy_(on(3), non_blocking=True)
    on(1).cpu()
    return told(by_item=by_item, by_copy=not bool(out.isnan().any()))


def operands(target: Target) -> Outcome:
    """Operands of the host or of another device are refused by every kind of op; scalars are not."""
    x, host, ids = on(4, 4), torch.ones(4, 4), torch.tensor([0, 2])
    calls: dict[str, Callable[[], object]] = {
        "mm": lambda: x @ host, "add": lambda: x + host, "cat": lambda: torch.cat([x, host]),
        "index": lambda: x[ids], "mask": lambda: x[host > 0], "index_select": lambda: x.index_select(0, ids),
        "index_put": lambda: x.index_put((ids,), on(2, 4)), "gather": lambda: x.gather(1, ids[:, None]),
        "where": lambda: torch.where(host > 0, x, x), "masked_fill": lambda: x.masked_fill(host > 0, 0.0),
        "embedding": lambda: torch.nn.functional.embedding(ids, x),
        "cross_entropy": lambda: torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 2, 3])),
        "linear": lambda: torch.nn.functional.linear(x, host), "in place": lambda: x.add_(host),
        "foreach": lambda: torch._foreach_add([x], [host]), "second device": lambda: x + host.to("sim:1"),
        "second of a list": lambda: torch.cat([x, host.to("sim:1")]),
    }  # fmt: skip
    claims = {name: refused(call, "same device") for name, call in calls.items()}
    scalar = torch.equal((x * torch.tensor(2.0)).cpu(), 2 * x.cpu())
    no_numpy = refused(x.numpy, error=TypeError)
    with quirk("accept_host"):
        quiet = torch.equal((x @ host).cpu(), x.cpu() @ host)
    return told(**claims, scalar=scalar, no_numpy=no_numpy, quirk=quiet)


def no_float64(target: Target) -> Outcome:
    """float64 does not reach the device, by any way."""
    x = on(3)
    calls: dict[str, Callable[[], object]] = {
        "empty": lambda: torch.empty(3, dtype=torch.float64, device="sim"), "cast": x.double,
        "copy": lambda: torch.ones(3, dtype=torch.float64).to("sim"),
        "new": lambda: torch.tensor([1.0], dtype=torch.float64, device="sim"),
        "sum": lambda: x.sum(dtype=torch.float64), "complex": lambda: x.to(torch.complex128),
    }  # fmt: skip
    claims = {name: refused(call, "float32", error=TypeError) for name, call in calls.items()}
    return told(**claims, on_host=x.cpu().double().to(torch.float32).to("sim").device.type == "sim")


def memory(target: Target) -> Outcome:
    """The account is exact, the capacity binds, and running out is survived, also in a backward pass."""
    used = sim.memory_allocated()
    sim.reset_peak_memory_stats()
    x = torch.empty(1000, device="sim")
    held = sim.memory_allocated() - used
    y = torch.empty(3000, device="sim")
    del y
    peak = sim.max_memory_allocated() - used
    sim.reset_peak_memory_stats()
    lowered = sim.max_memory_allocated() - used
    ops.set_capacity(0, sim.memory_allocated() + 100_000)
    out = refused(
        lambda: torch.empty(30_000, device="sim"), "sim out of memory", error=torch.OutOfMemoryError
    )
    weight = torch.nn.Parameter(torch.ones(10_000, device="sim"))
    backward = refused((weight * weight).sum().backward, error=torch.OutOfMemoryError)
    ops.set_capacity(0, 4 << 30)
    (weight * weight).sum().backward()
    assert weight.grad is not None
    elsewhere = sim.memory_allocated("sim:1")
    z = torch.ones(10, device="sim:1")
    return told(
        held=held == 4000, peak=peak == 16000, lowered=lowered == 4000, out=out, backward=backward,
        recovered=float(weight.grad.sum()) == 20_000.0, poison=bool(x.isnan().all()), freed=_frees(),
        second=sim.memory_allocated("sim:1") - elsewhere == z.nbytes, torch_agrees=_torch_agrees(),
    )  # fmt: skip


def _frees() -> bool:
    before = sim.memory_allocated()
    for _ in range(50):
        w = on(64, 64).requires_grad_()
        (w @ w).square().sum().backward()
    del w
    return bool(sim.memory_allocated() == before)


def _torch_agrees() -> bool:
    return bool(torch.accelerator.memory_allocated(0) == sim.memory_allocated(0))


def views(target: Target) -> Outcome:
    """Views share their memory with what they are of, those of ops without a kernel of ours included."""
    x = torch.zeros(4, 6, device="sim")
    for number, view in enumerate(
        (x[1:3, ::2], x.t(), x.view(2, 12), x.diagonal(), x.unfold(1, 2, 2), x.flatten(),
         x.expand(2, 4, 6)[0],
         torch.view_as_complex(x.view(4, 3, 2)).real, x.view(torch.int32).view(torch.float32))
    ):  # fmt: skip
        view.fill_(number + 1.0)
        if float(x.max()) != number + 1.0:
            return failed(f"view {number} writes elsewhere")
    storage = x.untyped_storage()
    x.fill_(5.0)
    storage.resize_(0)
    asleep = storage.nbytes() == 0
    storage.resize_(96)
    fresh = bool(x.isnan().all())
    parameter = torch.nn.Parameter(on(3))
    parameter.data = parameter.data.cpu()
    moved = torch.nn.Linear(2, 2)
    weight = moved.weight
    moved.to("sim")
    same = moved.weight is weight and weight.device == torch.device("sim", 0)
    return told(asleep=asleep, fresh=fresh, swapped=parameter.device.type == "cpu", same_parameter=same)


def generators(target: Target) -> Outcome:
    """Seeds, states and generators of each device; one of the host is refused."""
    torch.manual_seed(3)
    first = torch.rand(5, device="sim")
    second = torch.rand(5, device="sim:1")
    torch.manual_seed(3)
    again = torch.rand(5, device="sim")
    state = sim.get_rng_state()
    drawn = torch.rand(5, device="sim")
    sim.set_rng_state(state)
    continued = torch.rand(5, device="sim")
    own = torch.Generator(device="sim").manual_seed(9)
    by_own = torch.rand(5, generator=own, device="sim")
    with quirk("keep_rng"):
        sim.set_rng_state(state)
        ignored = not torch.equal(torch.rand(5, device="sim").cpu(), drawn.cpu())
    host = torch.Generator().manual_seed(9)
    return told(
        seeded=torch.equal(first.cpu(), again.cpu()), each_device=torch.equal(first.cpu(), second.cpu()),
        restored=torch.equal(drawn.cpu(), continued.cpu()), quirk=ignored,
        own=torch.equal(by_own.cpu(), torch.rand(5, generator=host)),
        host_refused=refused(lambda: torch.rand(5, generator=host, device="sim"), "sim"),
    )  # fmt: skip


def faults(target: Target) -> Outcome:
    """Ops can be missing, fail once or answer with NaN or zeros; allocator and copies can misbehave."""
    x = on(3, 3)
    try:
        ops.deny(["aten::mm"])
        denied = refused(lambda: x @ x, "not implemented", error=NotImplementedError)
        ops.clear_faults()
        ops.inject("aten::mm", 2, "nan")
        second = [bool((x @ x).isnan().any()) for _ in range(3)]
        ops.clear_faults()
        ops.inject("aten::mm", 0, "zero")
        zeros = [bool((x @ x == 0).all()) for _ in range(2)]
        ops.clear_faults()
        ops.inject("aten::mm", 1, "raise")
        raised = refused(lambda: x @ x, "device-side")
    finally:
        ops.clear_faults()
    ops.count_calls(True)
    x @ x
    counted = ops.calls("aten::mm")
    ops.count_calls(False)
    with quirk("leak"):
        used = sim.memory_allocated()
        torch.empty(100, device="sim")
        leaked = sim.memory_allocated() - used
    pinned = torch.empty(3).pin_memory()
    with quirk("lost_copy"):
        pinned.copy_(on(3), non_blocking=True)
        sim.synchronize()
        lost = bool(pinned.isnan().all())
    with quirk("early_copies"):
        pinned.copy_(on(3), non_blocking=True)
    return told(
        denied=denied, second_call=second == [False, True, False], zeros=zeros == [True, True], raised=raised,
        counted=counted == 1, healthy=not bool((x @ x).isnan().any()), leaked=leaked == 400, lost=lost,
        early=torch.equal(pinned, on(3).cpu()),
        unknown=refused(lambda: ops.quirk("nonsense", True), "nonsense", error=ValueError),
    )  # fmt: skip


def gradients(target: Target) -> Outcome:
    """Forward, backward and double backward are the CPU's, convolutions and attention included."""

    def answers(device: str) -> list[Tensor]:
        def leaf(*shape: int, seed: int) -> Tensor:
            return on(*shape, seed=seed).to(device).requires_grad_()

        x, w, c = leaf(2, 3, 8, seed=1), leaf(4, 8, seed=2), leaf(3, 1, 3, seed=3)
        y = torch.nn.functional.conv1d(x, c, padding=1, groups=3)
        y = torch.nn.functional.layer_norm(torch.nn.functional.silu(y @ w.t()), (4,))
        z = torch.nn.functional.scaled_dot_product_attention(y[None], y[None], y[None], is_causal=True)
        attended = torch.autograd.grad(z.square().sum(), (x, w, c), retain_graph=True)
        first = torch.autograd.grad(y.pow(3).sum(), (x, w, c), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, c))
        return [t.detach().cpu() for t in (y, z, *attended, *first, *second)]

    # The kernels are the CPU's; torch goes another way through attention and layer norm for a foreign device.
    close = [torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())) for a, b in
             zip(answers("sim"), answers("cpu"), strict=True)]  # fmt: skip
    return passed() if all(close) else failed(f"results that agree: {close}")


def pages(target: Target) -> Outcome:
    """Attention over pages is the reference's, across page borders and through forks in the middle of one."""
    from grpo_conformance.sim import attention as paged
    from grpo_core.ops.attention import CacheSpec
    from grpo_core.ops.reference import attention as plain

    generator = torch.Generator().manual_seed(5)
    K, D, E = 2, 16, 32
    lengths = {"root": 300, "kept": 128, "new": 140}

    def life(module: object, cache_type: type, device: str) -> list[Tensor]:
        generator.manual_seed(5)
        spec = CacheSpec(num_layers=2, num_key_value_heads=K, head_dim=D, v_head_dim=E, dtype=torch.float32,
                         device=torch.device(device), max_slots=6, max_tokens=900)  # fmt: skip
        cache, found = cache_type(spec), []
        root = cache.allocate(lengths["root"])

        def extend(slot: int, start: int, count: int) -> None:
            for layer in cache.layers:
                k, v = (
                    torch.randn(count, K, D, generator=generator),
                    torch.randn(count, K, E, generator=generator),
                )
                layer.write(
                    k.to(device), v.to(device), slots_T=torch.full((count,), slot, device=device),
                    positions_T=torch.arange(start, start + count, device=device),
                )  # fmt: skip

        def ask(slots: list[int], seen: list[int], window: int | None) -> None:
            q = torch.randn(len(slots), 4, D, generator=generator).to(device)
            for layer in cache.layers:
                found.append(module.decode(  # type: ignore[attr-defined]
                    q, layer, seqlens_k=torch.tensor(seen, device=device), scale=0.3, window=window,
                    slots=torch.tensor(slots, device=device),
                ).cpu())  # fmt: skip

        extend(root, 0, 300)
        children = [cache.fork(root, prefix=n, length=lengths["new"]) for n in (300, 128, 5)]
        for child, start in zip(children, (300, 128, 5), strict=True):
            extend(child, start, lengths["new"])
        cache.free(root)
        ask(children, [440, 268, 145], None)
        ask(children[::-1], [17, 128, 301], 100)
        for child in children:
            cache.free(child)
        whole = cache.allocate(900)
        extend(whole, 0, 900)
        ask([whole], [900], None)
        full = cache.allocate(1) is None
        return [*found, torch.tensor(float(full))]

    got = life(paged, paged.PagedCache, "sim")
    wanted = life(plain, plain.DenseCache, "cpu")
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, wanted, strict=True))
    return told(same=same, full=bool(got[-1] == 1))


def second_device(target: Target) -> Outcome:
    """The second device opens, computes and leaves the first alone; there is no third."""
    device = target.device.open(1)
    there = torch.ones(3, device="sim").device == device
    works = float((torch.ones(3, device=device) * 2).sum()) == 6.0
    beyond = refused(lambda: torch.ones(3, device="sim:2"))
    back = target.device.open(0)
    return told(there=there, works=works, beyond=beyond, back=torch.ones(1, device="sim").device == back)
