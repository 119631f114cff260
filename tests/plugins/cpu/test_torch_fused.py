from __future__ import annotations

from types import SimpleNamespace

import op_checks as check
import pytest
import torch

from grpo_core.errors import PlanError
from grpo_cpu import adamw, linear, logprob, rows
from grpo_cpu.mlp import swiglu
from grpo_cpu.norm import rms_norm
from grpo_cpu.rope import rope_apply

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_rms_norm(count: int, residual: bool, zero_centered: bool, dtype: torch.dtype) -> None:
    check.check_rms_norm(rms_norm, dtype, count, zero_centered, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [6, 4])
def test_rope(pairs: int, interleaved: bool, dtype: torch.dtype) -> None:
    check.check_rope(rope_apply, dtype, interleaved, pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    check.check_swiglu(swiglu, dtype)


def test_pieces_cover_every_row_once() -> None:
    for count, width in ((0, 3), (1, 10**9), (1000, 700), (7, 0)):
        covered = [i for part in rows.pieces(count, width) for i in range(part.start, part.stop)]
        assert covered == list(range(count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (1, 7), (23, 40), (0, 5)])
def test_logprob(tokens: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "CHUNK", 5 * vocab)
    monkeypatch.setattr(logprob, "PIECE", 2 * vocab)
    check.check_logprob(logprob.logprob, dtype, tokens, vocab)


def test_logprob_refuses_temperatures_and_labels_that_make_no_sense() -> None:
    check.check_logprob_refuses(logprob.logprob)


def test_logprob_refuses_a_split_vocabulary() -> None:
    x = torch.ones(1, 2)
    with pytest.raises(PlanError, match="split between 2 ranks"):
        logprob.logprob(x, x, torch.tensor([0]), temperature=1.0, group=SimpleNamespace(rank=0, size=2))


@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
@pytest.mark.parametrize("piece", [1 << 18, 16])
def test_adamw(piece: int, grad_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "PIECE", piece)
    check.check_adamw(adamw.adamw, grad_scale)


def test_adamw_refuses_what_it_cannot_step_in_place() -> None:
    x = torch.zeros(3, 2).T
    with pytest.raises(ValueError, match="contiguous"):
        adamw.adamw(
            [x], [x], [x], [x], step=1, lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decays=[0.0],
            grad_scale=1.0, copies=[None],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 3), (70, 33), (256, 64)])
def test_packed_linear(outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, outputs, inputs, generator=generator).to(dtype)
    biases = torch.randn(2, outputs, generator=generator).to(dtype)
    layer = linear.OneDnnLinear(weights[0], biases[0] if with_bias else None)
    for version in (0, 1, 0):
        weight, bias = weights[version].clone(), biases[version].clone() if with_bias else None
        layer.update(weight, bias)
        weight.zero_()  # the layer keeps its own copy
        for count in (0, 1, 5, 130):
            x = torch.randn(count, inputs, generator=generator).to(dtype)
            wanted = x.double() @ weights[version].double().T
            if with_bias:
                wanted = wanted + biases[version].double()
            check.oracle.assert_close([layer(x)], [wanted], dtype)
    assert layer.nbytes() == weights[0].nbytes + (biases[0].nbytes if with_bias else 0)


def test_packed_linear_refuses_other_shapes_and_dtypes() -> None:
    weight, bias = torch.randn(4, 3), torch.randn(4)
    layer = linear.OneDnnLinear(weight, bias)
    for new, new_bias in ((weight.T, bias), (weight.bfloat16(), bias), (weight, None), (weight, bias[:3])):
        with pytest.raises(ValueError, match="cannot take"):
            layer.update(new, new_bias)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)
