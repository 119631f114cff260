"""loss.logprob of the C++ pack against log_softmax and autograd in float64."""

from __future__ import annotations

import importlib

import pytest
import torch

from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native = importlib.import_module("grpo_cpu.native_logprob")


def case(T: int, V: int, C: int):
    random = torch.Generator().manual_seed(T + V)
    hidden = torch.randn(T, C, generator=random).bfloat16()
    head = (torch.randn(V, C, generator=random) * 2 / C**0.5).bfloat16()
    labels = torch.randint(0, V, (T,), generator=random)
    return hidden, head, labels, torch.randn(T, generator=random), torch.randn(T, generator=random) * 0.1


def exact(hidden, head, labels, temperature, g_logprob, g_entropy):
    """float64 results and gradients from logits rounded to bf16, which the offer declares."""
    hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()
    logits = hidden @ head.T
    rounded = (hidden.detach().bfloat16() @ head.detach().bfloat16().T).double()
    logp = ((logits + (rounded - logits).detach()) / temperature).log_softmax(-1)
    logprob = logp.gather(1, labels[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    ((logprob * g_logprob).sum() + (entropy * g_entropy).sum()).backward()
    return logprob.detach(), entropy.detach(), hidden.grad, head.grad


def relative(got, want) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("T, V, C", [(1, 1, 8), (5, 17, 16), (33, 1000, 64), (130, 4099, 32)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1 << 25, 5000])
def test_values_and_gradients(T, V, C, temperature, chunk, monkeypatch):
    monkeypatch.setattr(native, "CHUNK_ELEMENTS", chunk)
    hidden, head, labels, g_logprob, g_entropy = case(T, V, C)
    ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    logprob, entropy = native.logprob(*ours, labels, temperature=temperature, group=None)
    torch.autograd.backward([logprob, entropy], [g_logprob, g_entropy])
    want = exact(hidden, head, labels, temperature, g_logprob, g_entropy)
    assert logprob.dtype == entropy.dtype == torch.float32
    # torch.mm may round a logit to the neighbouring bf16 in another blocking (2^-7 of it, logits below 8):
    # allowed for single logits, so 1e-2 on their own log-prob and much less on a sum over the vocabulary.
    torch.testing.assert_close(logprob.double(), want[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(entropy.double(), want[1], rtol=1e-5, atol=2e-3)
    assert (logprob.double() - want[0]).abs().median() < 1e-5
    if V > 1:
        # The gradient of the logits is rounded once (2^-8), the products once more: below 2^-7 in the norm.
        assert relative(ours[0].grad, want[2]) < 2**-7
        assert relative(ours[1].grad, want[3]) < 2**-7
    else:
        # One token has probability 1: left is the rounding of its log-sum-exp, 2^-24 of the logit.
        assert ours[0].grad.abs().max() < 1e-6 and ours[1].grad.abs().max() < 1e-6
    assert torch.equal(ours[0], hidden) and torch.equal(ours[1], head)


def test_the_gradient_of_the_head_is_summed_in_float32_over_many_chunks(monkeypatch):
    """Summed in bfloat16, 200 equal chunks would stop growing after the first few."""
    monkeypatch.setattr(native, "CHUNK_ELEMENTS", 50)
    hidden, labels = torch.ones(200, 32).bfloat16(), torch.zeros(200, dtype=torch.int64)
    head = torch.zeros(50, 32).bfloat16().requires_grad_()
    logprob, _ = native.logprob(hidden, head, labels, temperature=1.0, group=None)
    logprob.sum().backward()
    torch.testing.assert_close(
        head.grad[0].float(), torch.full((32,), 200 * (1 - 1 / 50)), rtol=2**-7, atol=0
    )
    torch.testing.assert_close(head.grad[1].float(), torch.full((32,), -200 / 50), rtol=2**-7, atol=0)


def test_only_one_result_or_one_gradient_wanted():
    hidden, head, labels, g_logprob, _ = case(9, 300, 32)
    for wants in ((True, False), (False, True)):
        leaves = [x.clone().requires_grad_(want) for x, want in zip((hidden, head), wants, strict=True)]
        logprob, _ = native.logprob(*leaves, labels, temperature=1.0, group=None)
        logprob.backward(g_logprob)
        assert [leaf.grad is not None for leaf in leaves] == list(wants)


def test_a_masked_vocabulary_gives_finite_results():
    head = torch.zeros(40, 8).bfloat16()
    hidden = torch.full((2, 8), 1.0).bfloat16()
    head[10:] = -3e37
    head.requires_grad_()
    logprob, entropy = native.logprob(hidden, head, torch.tensor([3, 9]), temperature=1.0, group=None)
    (logprob.sum() + entropy.sum()).backward()
    torch.testing.assert_close(logprob, torch.full((2,), 0.1).log())
    torch.testing.assert_close(entropy, -torch.full((2,), 0.1).log())
    assert head.grad.isfinite().all()


def test_no_tokens():
    hidden, head = (
        torch.zeros(0, 8).bfloat16().requires_grad_(),
        torch.zeros(5, 8).bfloat16().requires_grad_(),
    )
    logprob, entropy = native.logprob(
        hidden, head, torch.zeros(0, dtype=torch.int64), temperature=1.0, group=None
    )
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,) and not head.grad.any() and hidden.grad.shape == (0, 8)


def test_runs_are_bit_equal():
    hidden, head, labels, g_logprob, g_entropy = case(100, 2000, 32)
    found = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        results = native.logprob(*leaves, labels, temperature=0.9, group=None)
        torch.autograd.backward(results, [g_logprob, g_entropy])
        found.append([*results, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_outside_of_the_vocabulary_is_an_error(label):
    with pytest.raises(IndexError, match="label"):
        native.logprob(
            torch.zeros(1, 8).bfloat16(),
            torch.zeros(5, 8).bfloat16(),
            torch.tensor([label]),
            temperature=1.0,
            group=None,
        )


def test_a_temperature_of_zero_is_an_error():
    with pytest.raises(ValueError, match="temperature"):
        native.logprob(
            torch.zeros(1, 8).bfloat16(),
            torch.zeros(5, 8).bfloat16(),
            torch.tensor([0]),
            temperature=0.0,
            group=None,
        )


@pytest.mark.parametrize("T, V, C", [(1, 1, 8), (33, 1000, 65), (130, 4099, 32)])
@pytest.mark.parametrize("chunk", [1 << 25, 5000])
@pytest.mark.parametrize("lent", [False, True])
def test_float32_values_and_gradients(T, V, C, chunk, lent, monkeypatch):
    monkeypatch.setattr(native, "CHUNK_ELEMENTS", chunk)
    hidden, head, labels, g_logprob, g_entropy = (
        x.float() if x.is_floating_point() else x for x in case(T, V, C)
    )
    ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    main_grad = torch.ones(V, C) if lent else None
    logprob, entropy = native.logprob(*ours, labels, temperature=0.7, group=None, main_grad_VC=main_grad)
    torch.autograd.backward([logprob, entropy], [g_logprob, g_entropy])
    wide = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    logp = (wide[0] @ wide[1].T / 0.7).log_softmax(-1)
    want = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    torch.autograd.backward(want, [g_logprob.double(), g_entropy.double()])
    head_grad = ours[1].grad if main_grad is None else main_grad - 1
    # Logits below 16 are float32 sums of up to 65 products: some units of 2^-20.
    for got, exact in (
        (logprob, want[0]),
        (entropy, want[1]),
        (ours[0].grad, wide[0].grad),
        (head_grad, wide[1].grad),
    ):
        torch.testing.assert_close(got.double(), exact.detach(), rtol=2e-5, atol=2e-5)
