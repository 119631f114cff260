"""linear.dense and linear.packed of the CPU plugin against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grpo_core.ops.reference.fused import linear_dense
from grpo_cpu import dense as torch_dense
from grpo_cpu import remake
from grpo_cpu.native import compiler, cpu_flags

SHAPES = [(1, 1, 2), (7, 16, 48), (33, 50, 34), (64, 100, 130), (130, 17, 96), (5, 31, 47), (0, 4, 6)]
BF16 = 2.0**-8
"""Half a unit in the last place of bfloat16, relative."""


def native() -> Any:
    if "avx512_bf16" not in cpu_flags() or compiler() is None:
        pytest.skip("the C++ pack needs AVX512-BF16 and a compiler")
    from grpo_cpu import native_linear

    return native_linear


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    tokens, rows, width = shape
    make = torch.Generator().manual_seed(tokens * 1000 + rows)
    sizes = ((tokens, width), (rows, width), (rows,), (tokens, rows))
    return [torch.randn(size, generator=make).to(dtype) for size in sizes]


def offers() -> list[Any]:
    return [
        pytest.param("native", torch.bfloat16, id="native-bf16"),
        pytest.param("native", torch.float32, id="native-f32"),
        pytest.param("torch", torch.bfloat16, id="torch-bf16"),
        pytest.param("torch", torch.float32, id="torch-f32"),
        pytest.param("reference", torch.bfloat16, id="reference-bf16"),
    ]


def offer(name: str) -> Callable[..., torch.Tensor]:
    dense: Callable[..., torch.Tensor] = {
        "native": lambda: native().dense,
        "torch": lambda: torch_dense.dense,
        "reference": lambda: linear_dense,
    }[name]()
    return dense


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype"), offers())
@pytest.mark.parametrize("bias", [False, True])
def test_result_and_gradients_equal_float64(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int], bias: bool
) -> None:
    x, w, b, g = operands(shape, dtype)
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    start = torch.linspace(-1, 1, w.numel()).view(w.shape)
    main_grad = start.clone()
    y = offer(name)(inputs[0], inputs[1], inputs[2] if bias else None, main_grad_NK=main_grad)
    y.backward(g)
    wanted = torch.nn.functional.linear(wide[0], wide[1], wide[2] if bias else None)
    wanted.backward(g.double())
    # Sums of products are float32; what has the compute dtype is rounded once, but for torch's product, which
    # is rounded before the bias and after it.
    unit = BF16 if dtype == torch.bfloat16 else 2.0**-24
    often = 0.0 if name == "native" else 2 * unit

    def check(found: torch.Tensor, wanted: torch.Tensor, terms: int, *, rounded: float = unit) -> None:
        largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
        atol = 2e-6 * (1 + terms) + often * largest
        torch.testing.assert_close(found.double(), wanted, rtol=2 * rounded, atol=atol)

    check(y, wanted, shape[2])
    check(inputs[0].grad, wide[0].grad, shape[1])
    if bias:
        check(inputs[2].grad, wide[2].grad, 2 * shape[0])
    assert inputs[1].grad is None
    check(main_grad, start.double() + wide[1].grad, shape[0], rounded=2.0**-24)


@pytest.mark.parametrize(("name", "dtype"), offers())
def test_without_a_main_grad_autograd_gets_the_gradient(name: str, dtype: torch.dtype) -> None:
    x, w, _, g = operands((33, 50, 34), dtype)
    w.requires_grad_()
    offer(name)(x, w, None, main_grad_NK=None).backward(g)
    assert w.grad is not None
    torch.testing.assert_close(w.grad.double(), g.double().T @ x.double(), rtol=2 * BF16, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x, w, _, g = operands((130, 100, 96), dtype)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            main_grad = torch.zeros(w.shape)
            y = native().dense(x, w.clone().requires_grad_(), None, main_grad_NK=main_grad)
            y.backward(g)
            found.append((y.detach(), main_grad))
    finally:
        torch.set_num_threads(threads)
    for y, main_grad in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(main_grad, found[0][1])


def block(x: torch.Tensor, weights: list[torch.Tensor], grads: list[torch.Tensor | None]) -> torch.Tensor:
    """Norm, gate and up, SwiGLU, down: inputs of both linears can be made again."""
    from grpo_cpu import native_ops

    dense = native().dense
    h, total = native_ops.rms_norm(x, weights[0], eps=1e-6, residual=x, zero_centered=False)
    h = native_ops.swiglu(dense(h, weights[1], None, main_grad_NK=grads[0]))
    y: torch.Tensor = dense(h, weights[2], None, main_grad_NK=grads[1]) + total
    return y


@pytest.mark.parametrize("recompute", [False, True])
def test_inputs_that_are_made_again_give_the_gradients_of_kept_ones(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = native()
    monkeypatch.setattr("grpo_cpu.remake.ROOM", 0)
    make = torch.Generator().manual_seed(3)
    sizes = ((40, 64), (64,), (96, 64), (64, 48))
    x, *weights = (torch.randn(size, generator=make).bfloat16().requires_grad_() for size in sizes)

    def run() -> list[torch.Tensor]:
        grads = [torch.zeros(weights[1].shape), torch.zeros(weights[2].shape)]
        for t in (x, *weights):
            t.grad = None
        if recompute:
            y = checkpoint(block, x, weights, grads, use_reentrant=False)
        else:
            y = block(x, weights, grads)
        y.float().square().sum().backward()
        return [*grads, x.grad, weights[0].grad]

    again = run()
    monkeypatch.setattr(module, "maker_of", lambda tensor: None)
    for made, kept in zip(again, run(), strict=True):
        assert made.count_nonzero() > 0 and torch.equal(made, kept)


@pytest.mark.parametrize(
    ("room", "narrow", "stay"), [(0, 512, 0), (8 * 32 * 2, 512, 1), (1 << 20, 512, 2), (1 << 20, 15, 0)]
)
def test_a_norm_and_a_swiglu_before_a_linear_keep_narrow_results_while_there_is_room(
    room: int, narrow: int, stay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = native()
    held: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.untyped_storage().data_ptr())
        return tensor

    from grpo_cpu import native_ops

    before = remake._kept_bytes
    monkeypatch.setattr("grpo_cpu.remake.ROOM", before + room)
    monkeypatch.setattr("grpo_cpu.remake.NARROW", narrow)
    x = torch.ones(8, 32, dtype=torch.bfloat16, requires_grad=True)
    w = torch.ones(32, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = native_ops.rms_norm(x, w[0], eps=1e-6, residual=None, zero_centered=False)
        y = module.dense(h, w, None, main_grad_NK=torch.zeros(32, 32))
        z = native_ops.swiglu(y)
        out = module.dense(z, w[:, :16].contiguous(), None, main_grad_NK=torch.zeros(32, 16))
    results = [h.untyped_storage().data_ptr(), z.untyped_storage().data_ptr()]
    assert [at for at in results if at in held] == results[:stay]
    del out, y, z
    assert remake._kept_bytes == before


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, BF16), (torch.float32, 2.0**-24)])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_layer_equals_float64_before_and_after_an_update(
    shape: tuple[int, int, int], dtype: torch.dtype, unit: float
) -> None:
    x, w, b, _ = operands(shape, dtype)
    layer = native().PackedLinear(w, b)
    for weight, bias in ((w, b), (w.flip(0) * 2, b - 1)):
        layer.update(weight, bias)
        wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(layer(x).double(), wanted, rtol=2 * unit, atol=4e-6 * (1 + shape[2]))
    assert layer.nbytes() >= w.nbytes + b.nbytes
    with pytest.raises(ValueError):
        layer.update(w.double(), b)


@pytest.mark.parametrize(("name", "dtype"), offers())
def test_the_weights_gradient_of_many_micro_batches_is_not_rounded_to_bfloat16(
    name: str, dtype: torch.dtype
) -> None:
    x, w, _, g = operands((4, 32, 48), dtype)
    main_grad = torch.zeros(w.shape)
    for _ in range(64):
        leaf = w.clone().requires_grad_()
        offer(name)(x, leaf, None, main_grad_NK=main_grad).backward(g)
    wanted = 64 * g.double().T @ x.double()
    # Sums of 256 float32 products; a gradient rounded to bfloat16 is off by 2^-9 of itself.
    torch.testing.assert_close(main_grad.double(), wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", [(20, 30, 4500), (4500, 20, 30), (20, 4500, 30)])
def test_long_sums_in_float32_go_in_pieces(shape: tuple[int, int, int]) -> None:
    """Every one of the three products sums over more than two pieces of 2048 once."""
    x, w, b, g = operands(shape, torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    packed = native().PackedLinear(w.detach(), b.detach())(x.detach())
    y = native().dense(*leaves, main_grad_NK=None)
    wanted = torch.nn.functional.linear(*wide)
    y.backward(g)
    wanted.backward(g.double())
    # Errors of a sum of n products of unit size grow with the root of n.
    atol = 1e-6 * max(shape) ** 0.5 * 4
    for found, exact in (
        (y, wanted),
        (packed, wanted),
        *((a.grad, e.grad) for a, e in zip(leaves, wide, strict=True)),
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=atol)
