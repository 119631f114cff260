"""torch_npu's own operations: real schemas, real autograd, and errors planted one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from grpo_conformance.cann.ops import references

npu = "npu:0"


@pytest.mark.parametrize("name", sorted(references()))
def test_references_take_what_the_schema_says(name: str) -> None:
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.npu, base, None)
    if packet is None:
        pytest.skip(f"this torch_npu has no {base}")
    arguments = getattr(packet, overload or "default")._schema.arguments
    parameters = inspect.signature(references()[name]).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in arguments:
        assert argument.name in parameters or (open_ended and argument.kwarg_only), argument.name
        if argument.name in parameters:
            ours = parameters[argument.name]
            assert (ours.kind is ours.KEYWORD_ONLY) == argument.kwarg_only, argument.name
            assert (ours.default is not ours.empty) == argument.has_default_value(), argument.name
            if argument.has_default_value():
                assert ours.default == argument.default_value, argument.name


def mask() -> Tensor:
    return torch.triu(torch.ones(2048, 2048, dtype=torch.bool, device=npu), 1)


def attention(q: Tensor, **more: Any) -> Any:
    import torch_npu

    words: dict[str, Any] = {
        "atten_mask": mask(), "sparse_mode": 3, "actual_seq_qlen": [3, 7], "actual_seq_kvlen": [3, 7],
        "scale": 0.5,
    } | more  # fmt: skip
    return torch_npu.npu_fusion_attention(q, q, q, 2, words.pop("input_layout", "TND"), **words)


def test_gradients_go_through_the_vendors_formulas() -> None:
    import torch_npu

    torch.manual_seed(0)
    x = torch.randn(7, 2, 8)
    ours, theirs = x.to(npu).requires_grad_(), x.double().requires_grad_()
    y = attention(ours)[0]
    parts = [theirs[:3], theirs[3:]]
    want = torch.cat([
        functional.scaled_dot_product_attention(*[p.transpose(0, 1)] * 3, is_causal=True, scale=0.5)
        .transpose(0, 1)
        for p in parts
    ])  # fmt: skip
    torch.testing.assert_close(y.cpu().double(), want, rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad((y * y).sum(), ours)
    (wanted,) = torch.autograd.grad((want * want).sum(), theirs)
    torch.testing.assert_close(g.cpu().double(), wanted, rtol=1e-4, atol=1e-4)
    row = torch.randn(4, 8, device=npu, requires_grad=True)
    gain = torch.ones(8, device=npu, requires_grad=True)
    torch_npu.npu_swiglu(torch_npu.npu_rms_norm(row, gain)[0]).sum().backward()
    assert row.grad is not None and gain.grad is not None and row.grad.abs().sum() > 0


def test_permutation_and_its_gradient_go_through_the_vendors_formulas() -> None:
    import torch_npu

    torch.manual_seed(0)
    x = torch.randn(5, 4, device=npu, requires_grad=True)
    probs = torch.rand(5, 2, device=npu, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]], dtype=torch.int32, device=npu)
    rows, places = torch_npu.npu_moe_token_permute(x, ids)
    y = torch_npu.npu_moe_token_unpermute(rows, places, probs=probs)
    torch.testing.assert_close(y.cpu(), (x * probs.sum(1, keepdim=True)).cpu())
    y.sum().backward()
    assert x.grad is not None and probs.grad is not None
    torch.testing.assert_close(x.grad.cpu(), probs.detach().sum(1, keepdim=True).expand(5, 4).cpu())
    torch.testing.assert_close(probs.grad.cpu(), x.detach().sum(1, keepdim=True).expand(5, 2).cpu())


def test_a_grouped_product_loses_gradients_in_silence_and_the_plugins_does_not() -> None:
    import torch_npu

    from grpo_ascend.grouped import grouped_linear

    x = torch.randn(4, 3, device=npu, requires_grad=True)
    w = torch.randn(2, 5, 3, device=npu, requires_grad=True)
    counts = torch.tensor([1, 3], device=npu)
    words = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1}
    (lost,) = torch_npu.npu_grouped_matmul([x], [w.transpose(1, 2)], **words)
    lost.sum().backward() if lost.requires_grad else None
    assert x.grad is None and w.grad is None
    kept = grouped_linear(x, w, counts)
    torch.testing.assert_close(kept.cpu(), lost.detach().cpu())
    kept.sum().backward()
    assert x.grad is not None and w.grad is not None


def plain(x: Tensor) -> Any:
    import torch_npu

    return torch_npu.npu_rms_norm(x, torch.ones(8, device=npu), eps=1e-6)


def newer(x: Tensor) -> Any:
    import torch_npu

    return torch_npu.npu_rms_norm_v9(x, torch.ones(8, device=npu))


WRONG: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "a keyword that no release has": (plain, RuntimeError, "eps"),
    "an op that this version has not": (newer, AttributeError, "npu_rms_norm_v9"),
    "a layout with a batch for packed rows": (lambda x: attention(x, input_layout="BSND"), RuntimeError, "."),
    "a layout that is none": (lambda x: attention(x, input_layout="THD"), RuntimeError, "layout|BSH"),
    "packed rows without lengths": (lambda x: attention(x, actual_seq_qlen=None), RuntimeError, "."),
    "a leading zero": (lambda x: attention(x, actual_seq_qlen=[0, 3, 7]), RuntimeError, "as many"),
    "lengths that miss rows": (lambda x: attention(x, actual_seq_qlen=[3, 6]), RuntimeError, "rise to 7"),
    "a mask of the lengths": (lambda x: attention(x, atten_mask=mask()[:7, :7]), RuntimeError, "2048"),
    "a mask turned round": (lambda x: attention(x, atten_mask=~mask()), RuntimeError, "its diagonal"),
    "integers": (lambda x: attention(x.int()), RuntimeError, "one dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_planted_errors_are_caught(name: str) -> None:
    call, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        call(torch.randn(7, 2, 8, device=npu))
