"""loss.logprob with `main_grad_VC`: the head's gradient is added in float32, autograd gets none."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from grpo_cpu.native import compiler, cpu_flags

OFFERS = {
    "reference": ("grpo_core.ops.reference.logprob", "CHUNK_ELEMENTS", torch.float32),
    "torch": ("grpo_cpu.logprob", "CHUNK", torch.float32),
    "native": ("grpo_cpu.native_logprob", "CHUNK_ELEMENTS", torch.bfloat16),
}
T, V, C = 30, 53, 16


def module_of(name: str) -> ModuleType:
    if name == "native" and ("avx512_bf16" not in cpu_flags() or compiler() is None):
        pytest.skip("the C++ pack needs AVX512-BF16 and a compiler")
    return importlib.import_module(OFFERS[name][0])


@pytest.mark.parametrize("name", OFFERS)
@pytest.mark.parametrize("rows", [T, 7], ids=["one chunk", "several"])
def test_equals_the_gradient_that_autograd_gets(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(name)
    monkeypatch.setattr(module, OFFERS[name][1], rows * V)
    dtype = OFFERS[name][2]
    make = torch.Generator().manual_seed(rows)
    hidden = torch.randn(T, C, generator=make).to(dtype).requires_grad_()
    head = torch.randn(V, C, generator=make).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=make)
    weight = torch.randn(2, T, generator=make)
    start = torch.randn(V, C, generator=make)

    def run(main_grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden.grad = head.grad = None
        logprob, entropy = module.logprob(
            hidden, head, labels, temperature=0.8, group=None, main_grad_VC=main_grad
        )
        (logprob * weight[0] + entropy * weight[1]).sum().backward()
        assert hidden.grad is not None
        return hidden.grad, head.grad

    main_grad = start.clone()
    g_hidden, g_head = run(main_grad)
    assert g_head is None
    wanted_hidden, wanted_head = run(None)
    assert torch.equal(g_hidden, wanted_hidden) and wanted_head is not None
    # What autograd gets in bfloat16 was rounded to 8 bits, the sum with `start` to float32.
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(main_grad - start, wanted_head.float(), rtol=rounding, atol=2e-6)


def test_native_backward_twice_over_kept_logits_gives_twice_the_gradient() -> None:
    module = module_of("native")
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, C, generator=make).bfloat16().requires_grad_()
    head = torch.randn(V, C, generator=make).bfloat16()
    labels = torch.randint(0, V, (T,), generator=make)
    logprob, _ = module.logprob(hidden, head, labels, temperature=1.0, group=None)
    logprob.sum().backward(retain_graph=True)
    once = hidden.grad.clone()
    logprob.sum().backward()
    assert torch.equal(hidden.grad, 2 * once)
