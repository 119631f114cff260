"""Training attention of the CUDA plugin: torch's forms as they are, kernels by their documented formulas."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import attention_formulas as vendor
import op_checks
import op_oracles as oracle
import pytest
import torch
from torch import Tensor

from grpo_conformance.ops.question import cumulative
from grpo_core.ops.common import Common
from grpo_cuda import flex, lengths, sdpa

KERNELS = ("flash", "varlen", "engine")


@pytest.fixture(scope="module")
def kernels() -> dict[str, ModuleType]:
    return {name: vendor.adapter(name) for name in KERNELS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("case", op_checks.LENGTHS)
def test_shared_prefix_in_sdpa(case: str, window: int | None, dtype: torch.dtype) -> None:
    op_checks.check_shared_prefix(sdpa.shared_prefix, case, dtype, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (3, True), (3, False)])
@pytest.mark.parametrize("case", ["one token", "ragged with an empty sequence", "equal"])
def test_varlen_in_sdpa(case: str, window: int | None, causal: bool, dtype: torch.dtype) -> None:
    op_checks.check_varlen(sdpa.varlen, case, dtype, window, causal)


def test_packing_in_sdpa() -> None:
    op_checks.check_packed_isolation(sdpa.varlen, sdpa.shared_prefix)
    op_checks.check_bad_packing(sdpa.varlen, sdpa.shared_prefix)


def qkv(T: int, dtype: torch.dtype, heads: tuple[int, int] = (6, 2)) -> list[Tensor]:
    """Of one size of keys and values, which the kernels want."""
    return op_checks.qkv(T, *heads, 16, 16, dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("case", op_checks.LENGTHS)
def test_shared_prefix_in_kernels(
    kernels: dict[str, ModuleType], name: str, case: str, window: int | None
) -> None:
    if name == "engine" and window is not None:
        with pytest.raises(ValueError, match="window"):
            run(kernels[name], case, window)
        return
    got, wanted = run(kernels[name], case, window)
    oracle.assert_close(got, wanted, torch.float32)


def run(module: ModuleType, case: str, window: int | None) -> tuple[list[Tensor], list[Tensor]]:
    sizes, parents = op_checks.LENGTHS[case]
    inputs = qkv(sum(sizes), torch.float32)
    arguments: dict[str, Any] = {"scale": 0.25, "window": window}
    got = oracle.with_grads(
        lambda q, k, v: module.shared_prefix(
            q, k, v, cu_seqlens=cumulative(sizes), parents=torch.tensor(parents, dtype=torch.int32),
            max_seqlen=max(sizes), **arguments,
        ),
        inputs,
    )  # fmt: skip
    wanted = oracle.with_grads(
        lambda q, k, v: oracle.attention(q, k, v, lengths=sizes, parents=parents, causal=True, **arguments),
        [x.double() for x in inputs],
    )
    return got, wanted


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (3, True), (3, False)])
def test_varlen_in_kernels(
    kernels: dict[str, ModuleType], name: str, window: int | None, causal: bool
) -> None:
    if name == "engine" and window is not None:
        with pytest.raises(ValueError, match="window"):
            op_checks.check_varlen(kernels[name].varlen, "equal", torch.float32, window, causal)
        return
    op_checks.check_varlen(
        kernels[name].varlen, "ragged with an empty sequence", torch.float32, window, causal
    )
    op_checks.check_varlen(kernels[name].varlen, "one token", torch.float32, window, causal)


@pytest.mark.parametrize("name", KERNELS)
def test_sequences_of_one_token_beside_empty_ones(kernels: dict[str, ModuleType], name: str) -> None:
    """The kernels take max_seqlen 1 to mean that every sequence has a query."""
    q, k, v = qkv(2, torch.float32)
    got = kernels[name].varlen(
        q, k, v, cu_seqlens=cumulative([1, 0, 1]), max_seqlen=1, scale=1.0, causal=True, window=None
    )
    oracle.assert_close([got], [v.repeat_interleave(3, 1).double()], torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_packing_in_kernels(kernels: dict[str, ModuleType], name: str) -> None:
    op_checks.check_bad_packing(
        lambda q, k, v, **rest: kernels[name].varlen(*(grown(x) for x in (q, k, v)), **rest),
        lambda q, k, v, **rest: kernels[name].shared_prefix(*(grown(x) for x in (q, k, v)), **rest),
    )
    q, k, v = qkv(0, torch.float32)
    nothing = {"cu_seqlens": cumulative([0, 0]), "max_seqlen": 0, "scale": 1.0, "window": None}
    assert kernels[name].varlen(q, k, v, causal=True, **nothing).shape == (0, 6, 16)


def grown(x: Tensor) -> Tensor:
    """Heads of 8, the least that the kernels take."""
    return torch.nn.functional.pad(x, (0, 8 - x.shape[-1]))


@pytest.mark.parametrize("name", ["flash", "engine"])
def test_equal_bits_are_asked_for_where_torch_is_asked_for_them(
    kernels: dict[str, ModuleType], name: str
) -> None:
    for asked in (True, False):
        torch.use_deterministic_algorithms(asked)
        try:
            vendor.CALLS.clear()
            run(kernels[name], "groups", None)
        finally:
            torch.use_deterministic_algorithms(False)
        assert [call["deterministic"] for _, call in vendor.CALLS] == [asked]


def test_kernels_get_halves_and_nothing_else_is_changed(
    kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vendor.STRICT, "dtype", True)
    q, k, v = qkv(6, torch.bfloat16)
    sliced = torch.cat([q, k, v], 1).split([6, 2, 2], 1)
    arguments: dict[str, Any] = {"cu_seqlens": cumulative([2, 4]), "max_seqlen": 4, "scale": 0.3,
                                 "causal": True, "window": None}  # fmt: skip
    for name in ("flash", "varlen"):
        out = kernels[name].varlen(*sliced, **arguments)
        assert torch.equal(out, kernels[name].varlen(q, k, v, **arguments))
        with pytest.raises(RuntimeError, match="fp16 and bf16"):
            kernels[name].varlen(q.float(), k.float(), v.float(), **arguments)


@pytest.mark.parametrize("parents", [[-1, 0, 0, -1, 3], [-1, -1, 1, 1, -1], [-1] * 5])
def test_gradients_of_gathered_keys_are_summed_in_float32(parents: list[int]) -> None:
    """bfloat16 sums of many children's gradients would lose what is small beside the first."""
    sizes = [3, 2, 0, 4, 1]
    k = torch.randn(10, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    plan = lengths.make_plan([0, 3, 5, 5, 9, 10], parents, torch.device("cpu"))
    if plan is None:
        assert parents == [-1] * 5
        return
    rows = plan.rows_N.tolist()
    ends = plan.cu_seqlens_k.tolist()
    for segment, parent in enumerate(parents):
        length = sizes[segment] + (sizes[parent] if parent >= 0 else 0)
        assert ends[segment + 1] - ends[segment] == length
    gathered = lengths.gather(k, plan)
    assert torch.equal(gathered, k.detach()[rows])
    g = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (got,) = torch.autograd.grad(gathered, k, g)
    wide = torch.zeros(10, 2, 4, dtype=torch.float64).index_add_(0, plan.rows_N, g.double())
    assert torch.equal(got, wide.bfloat16())


def test_a_pass_derives_its_plan_once() -> None:
    sizes, parents = op_checks.LENGTHS["groups"]
    given: dict[str, Any] = {
        "cu_seqlens": cumulative(sizes), "parents": torch.tensor(parents, dtype=torch.int32),
        "max_seqlen": max(sizes), "scale": 0.3, "window": None,
    }  # fmt: skip
    common = Common(cu_seqlens=cumulative(sizes).tolist(), parents=parents)
    for module in (sdpa, flex):
        q, k, v = qkv(sum(sizes), torch.float32)
        first = module.shared_prefix(q, k, v, **given, common=common)
        kept = len(common._kept)
        # The second layer reads neither tensor: it would see other lengths.
        other = {"cu_seqlens": torch.zeros_like(given["cu_seqlens"]), "parents": given["parents"] - 5}
        again = module.shared_prefix(q, k, v, **{**given, **other}, common=common)
        assert torch.equal(first, again) and len(common._kept) == kept


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("case", ["groups", "long beside short", "ragged with an empty sequence"])
def test_flex_forward(case: str, window: int | None) -> None:
    """Its backward pass exists on a GPU alone; the mask is what is ours."""
    sizes, parents = op_checks.LENGTHS[case]
    q, k, v = qkv(sum(sizes), torch.float32, (4, 2))
    tree = torch.tensor(parents, dtype=torch.int32)
    arguments: dict[str, Any] = {"scale": 0.25, "window": window}
    got = flex.shared_prefix(
        q, k, v, cu_seqlens=cumulative(sizes), parents=tree, max_seqlen=max(sizes), **arguments
    )
    wanted = oracle.attention(
        *(x.double() for x in (q, k, v)), lengths=sizes, parents=parents, causal=True, **arguments
    )
    oracle.assert_close([got], [wanted], torch.float32)
    if max(parents) < 0:
        for causal in (True, False):
            arguments = {"scale": 0.25, "window": window, "causal": causal}
            got = flex.varlen(q, k, v, cu_seqlens=cumulative(sizes), max_seqlen=max(sizes), **arguments)
            wanted = oracle.attention(
                *(x.double() for x in (q, k, v)), lengths=sizes, parents=parents, **arguments
            )
            oracle.assert_close([got], [wanted], torch.float32)


def test_packing_in_flex() -> None:
    op_checks.check_bad_packing(flex.varlen, flex.shared_prefix)


def nodes(node: Any) -> list[Any]:
    """A node of autograd's graph and all behind it."""
    return [node, *(one for behind, _ in node.next_functions if behind is not None for one in nodes(behind))]


@pytest.mark.parametrize("module", [sdpa, "varlen"])
@pytest.mark.parametrize("warn", [None, True, False])
def test_backward_kernels_of_torch_are_told_to_repeat_their_bits(
    kernels: dict[str, ModuleType], module: Any, warn: bool | None
) -> None:
    """Where warnings are all that is asked for, torch would take its other kernel: seen by what the setting
    is while gradients of the attention are computed, and after."""
    attention = kernels[module] if isinstance(module, str) else module
    during: list[bool] = []
    q, k, v = (x.requires_grad_() for x in qkv(7, torch.float32, (2, 2)))
    torch.use_deterministic_algorithms(warn is not None, warn_only=bool(warn))
    try:
        out = attention.varlen(
            q, k, v, cu_seqlens=cumulative([7]), max_seqlen=7, scale=0.3, causal=True, window=None
        )
        attentions = [node for node in nodes(out.grad_fn) if "ttention" in node.name()]
        [node] = attentions if module is sdpa else [out.grad_fn]
        node.register_prehook(
            lambda grads: during.append(torch.is_deterministic_algorithms_warn_only_enabled())
        )
        out.sum().backward()
        assert torch.are_deterministic_algorithms_enabled() == (warn is not None)
        assert torch.is_deterministic_algorithms_warn_only_enabled() == bool(warn)
    finally:
        torch.use_deterministic_algorithms(False)
    assert during == [False]
    assert q.grad is not None and bool(q.grad.isfinite().all())
