"""Checks of the `moe.*` ops against loops over tokens and experts, written from the papers in float64.

Routing: DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16 and the group-limited choice of its code); the
experts: SwiGLU (Shazeer 2020), y_t = sum_i g_it FFN_i(u_t). Nothing here uses the references of core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_oracles as oracle
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from grpo_conformance.ops.moe_oracles import route

FREE: dict[str, Any] = {
    "score": "sigmoid",
    "bias_X": None,
    "num_groups": 1,
    "topk_groups": 1,
    "norm": True,
    "scale": 1.0,
    "ids_Tk": None,
}
COUNTS = {
    "uneven": [3, 0, 1, 7, 0, 2],
    "one expert has all": [0, 0, 13, 0, 0, 0],
    "first and last": [1, 0, 0, 0, 0, 2],
    "one row": [0, 1, 0, 0, 0, 0],
    "no rows": [0] * 6,
    "more rows than a block": [70, 1, 33, 16, 17, 130],
    "more rows than are summed at a time": [9, 0, 0, 0, 0, 521],
}
SIZES = [(32, 16), (64, 48), (34, 22), (96, 160)]
"""Pairs of hidden size and intermediate size: multiples of 16 and not."""


def expert(row_C: Tensor, gate_up_GC: Tensor, down_CF: Tensor) -> Tensor:
    F = down_CF.shape[1]
    gate, up = gate_up_GC[:F] @ row_C, gate_up_GC[F:] @ row_C
    return down_CF @ (gate / (1 + torch.exp(-gate)) * up)


def layer(x_TC: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor) -> Tensor:
    """y_t = sum over its experts, one product at a time."""
    rows = []
    for t, ids in enumerate(ids_Tk.tolist()):
        parts = [weights_Tk[t, j] * expert(x_TC[t], gate_up_XGC[x], down_XCF[x]) for j, x in enumerate(ids)]
        rows.append(torch.stack(parts).sum(0))
    # The zeros keep a layer without tokens in the graph.
    nothing = (gate_up_XGC.sum() + down_XCF.sum() + weights_Tk.sum()) * 0
    return torch.stack(rows) + nothing if rows else x_TC + nothing


def randn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def random_ids(T: int, X: int, k: int, seed: int = 0) -> Tensor:
    return torch.rand(T, X, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k]


def weights_of(X: int, C: int, F: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        randn(X, 2 * F, C, dtype=dtype, seed=1, scale=C**-0.5),
        randn(X, C, F, dtype=dtype, seed=2, scale=F**-0.5),
    )


def check_route(impl: Callable[..., Any], logits_TX: Tensor, *, top_k: int, **changes: Any) -> None:
    """Ids equal, weights and the gradient of the logits close."""
    arguments = {**FREE, **changes, "top_k": top_k}
    leaf, wide = (logits_TX.to(t, copy=True).requires_grad_() for t in (logits_TX.dtype, torch.float64))
    weights_Tk, ids_Tk = impl(leaf, **arguments)
    wanted_Tk, wanted_ids_Tk = route(wide, **arguments)
    assert ids_Tk.dtype == torch.int64 and weights_Tk.dtype == logits_TX.dtype
    assert torch.equal(ids_Tk, wanted_ids_Tk)
    # A score has one rounding of exp, one of 1 + exp, one of a division; then come a sum and a division.
    bound = 16 * torch.finfo(logits_TX.dtype).eps
    torch.testing.assert_close(weights_Tk.double(), wanted_Tk, rtol=bound, atol=1e-30)
    g_Tk = randn(*weights_Tk.shape, dtype=torch.float64, seed=9)
    weights_Tk.backward(g_Tk.to(weights_Tk.dtype))
    wanted_Tk.backward(g_Tk.to(weights_Tk.dtype).double())
    # Gradients of normalised weights are differences of terms up to the scale: absolute error.
    torch.testing.assert_close(
        leaf.grad.double(), wide.grad, rtol=4 * bound, atol=bound * float(arguments["scale"]) * top_k
    )
    assert torch.equal(leaf.detach(), logits_TX)


ROUTES = [(1, 1, 1), (3, 1, 1), (12, 1, 1), (4, 4, 2), (6, 3, 2), (3, 12, 5)]
"""top_k, num_groups, topk_groups of 12 experts."""


def check_routes(
    impl: Callable[..., Any],
    T: int,
    case: tuple[int, int, int],
    *,
    norm: bool,
    score: str,
    dtype: torch.dtype,
) -> None:
    logits = randn(T, 12, dtype=dtype, seed=T, scale=2.0)
    for bias_X in (None, randn(12, dtype=torch.float32, seed=5, scale=0.3)):
        check_route(
            impl, logits, top_k=case[0], score=score, norm=norm, scale=2.5, bias_X=bias_X,
            num_groups=case[1], topk_groups=case[2],
        )  # fmt: skip


@st.composite
def routes(draw: Any) -> tuple[Tensor, dict[str, Any]]:
    """Logits of halves: equal ones have equal scores, others differ by far more than float32 rounds."""
    X, T = 8, draw(st.integers(0, 4))
    num_groups, topk_groups = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (8, 3)]))
    k = draw(st.integers(1, topk_groups * X // num_groups))
    halves = draw(st.lists(st.integers(-8, 8), min_size=T * X, max_size=T * X))
    score = draw(st.sampled_from(["sigmoid", "softmax"]))
    # Thirds are far from sums of the scores, or equal to one another.
    thirds = torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=X, max_size=X))) / 3
    fixed = torch.tensor([draw(st.permutations(range(X)))[:k] for _ in range(T)], dtype=torch.int64).view(
        T, k
    )
    fixed[torch.tensor([draw(st.booleans()) for _ in range(T)], dtype=torch.bool)] = -1
    return torch.tensor(halves).view(T, X) / 2, {
        "top_k": k,
        "score": score,
        "norm": draw(st.booleans()),
        "scale": 1.5,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "bias_X": thirds if score == "sigmoid" and draw(st.booleans()) else None,
        "ids_Tk": draw(st.sampled_from([None, fixed, fixed.to(torch.int16)])),
    }


def check_route_at_the_ends(impl: Callable[..., Any]) -> None:
    """Infinite and huge logits, no chosen score above 0, and chosen scores that underflow together."""
    inf = torch.inf
    logits = torch.tensor([[-inf, 1e4, -1e4, 0.0], [0.0, -inf, -inf, -inf], [1e4, 1e4, 1e4, 0.0]])
    for top_k in (1, 2, 4):
        for score in ("sigmoid", "softmax"):
            for norm in (False, True):
                check_route(impl, logits, top_k=top_k, score=score, norm=norm)
    weights, ids = impl(torch.full((1, 4), -inf), **{**FREE, "top_k": 2})
    assert weights.tolist() == [[0.0, 0.0]] and ids.tolist() == [[0, 1]]
    # Division by the sum of the chosen scores, taken literally, is 0 / 0 here.
    far = torch.tensor([[200.0, 1.0, 0.0, 0.0]], requires_grad=True)
    replayed = {**FREE, "score": "softmax", "top_k": 2, "ids_Tk": torch.tensor([[1, 2]])}
    weights, _ = impl(far, **replayed)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]).softmax(-1))
    weights[0, 0].backward()
    assert far.grad is not None and far.grad[0, 1] > 0.1 and bool(far.grad.isfinite().all())


def check_route_refusals(impl: Callable[..., Any]) -> None:
    for changes in (
        {"score": "tanh"}, {"top_k": 0}, {"top_k": 9}, {"num_groups": 3}, {"num_groups": 0},
        {"num_groups": 4, "topk_groups": 1, "top_k": 3}, {"num_groups": 2, "topk_groups": 3},
        {"ids_Tk": torch.zeros(2, 3)}, {"ids_Tk": torch.tensor([[0, 8], [1, 2]])},
        {"ids_Tk": torch.tensor([[0, -1], [1, 2]])}, {"ids_Tk": torch.tensor([[-2, -2], [1, 2]])},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            impl(torch.zeros(2, 8), **{**FREE, "top_k": 2, **changes})


def check_experts(impl: Callable[..., Tensor], dtype: torch.dtype, case: str, C: int, F: int) -> None:
    counts = COUNTS[case]
    rows = randn(sum(counts), C, dtype=dtype, seed=0)
    owner = [x for x, count in enumerate(counts) for _ in range(count)]
    inputs = [rows, *weights_of(len(counts), C, F, dtype)]
    copies = [x.clone() for x in inputs]
    got = oracle.with_grads(lambda r, g, d: impl(r, g, d, torch.tensor(counts)), inputs)
    wanted = oracle.with_grads(
        lambda r, g, d: layer(
            r, torch.tensor(owner).view(-1, 1), torch.ones(len(owner), 1, dtype=torch.float64), g, d
        ),
        [x.double() for x in inputs],
    )
    oracle.assert_close(got, wanted, dtype)
    assert got[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    with torch.no_grad():
        assert torch.equal(impl(*inputs, torch.tensor(counts)), got[0])


def check_main_grads(impl: Callable[..., Tensor], dtype: torch.dtype, case: str, C: int, F: int) -> None:
    """A main grad is added to in float32 and autograd gets nothing; the rest is as without them."""
    counts = torch.tensor(COUNTS[case])
    inputs = [randn(int(counts.sum()), C, dtype=dtype, seed=0), *weights_of(len(counts), C, F, dtype)]
    g_y = randn(len(inputs[0]), C, dtype=dtype, seed=4)
    plain = [x.clone().requires_grad_() for x in inputs]
    y = impl(*plain, counts)
    y.backward(g_y)
    wide = [x.double().requires_grad_() for x in inputs]
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    ones = torch.ones(len(owner), 1, dtype=torch.float64)
    layer(wide[0], owner.view(-1, 1), ones, *wide[1:]).backward(g_y.double())
    for lent in ((True, True), (True, False), (False, True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        starts = [randn(*x.shape, dtype=torch.float32, seed=5) for x in inputs[1:]]
        mains = [start.clone() if one else None for start, one in zip(starts, lent, strict=True)]
        again = impl(*leaves, counts, main_grad_gate_up_XGC=mains[0], main_grad_down_XCF=mains[1])
        again.backward(g_y)
        assert torch.equal(again, y) and torch.equal(leaves[0].grad, plain[0].grad)
        for leaf, other, exact, main, start in zip(
            leaves[1:], plain[1:], wide[1:], mains, starts, strict=True
        ):
            if main is None:
                assert torch.equal(leaf.grad, other.grad)
                continue
            assert leaf.grad is None
            # As the factors' rounding has it; the sum itself is not rounded to bfloat16.
            oracle.assert_close([(main - start).to(dtype)], [exact.grad], dtype)
            assert torch.equal(main[counts == 0], start[counts == 0])


def check_experts_of_strides(impl: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Slices and transposes give what contiguous tensors give, forward and backward."""
    counts = torch.tensor([2, 0, 3])
    inputs = [randn(5, 32, dtype=dtype, seed=0), *weights_of(3, 32, 16, dtype)]

    def strided(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = torch.stack([rows, rows], 2)[..., 0]
        gate_up = gate_up.transpose(1, 2).contiguous().transpose(1, 2)
        down = down.transpose(0, 1).contiguous().transpose(0, 1)
        assert not (rows.is_contiguous() or gate_up.is_contiguous() or down.is_contiguous())
        return impl(rows, gate_up, down, counts)

    wanted = oracle.with_grads(lambda r, g, d: impl(r, g, d, counts), inputs)
    oracle.assert_close(oracle.with_grads(strided, inputs), [x.double() for x in wanted], dtype)


def check_gradient_of_few(impl: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Each input alone has the gradient that it has beside the others."""
    counts = torch.tensor([2, 0, 3])
    inputs = [randn(5, 32, dtype=dtype, seed=0), *weights_of(3, 32, 16, dtype)]
    whole = [x.clone().requires_grad_() for x in inputs]
    g_y = randn(5, 32, dtype=dtype, seed=4)
    impl(*whole, counts).backward(g_y)
    for place in range(3):
        leaves = [x.clone().requires_grad_(place == i) for i, x in enumerate(inputs)]
        impl(*leaves, counts).backward(g_y)
        assert [leaf.grad is not None for leaf in leaves] == [place == i for i in range(3)]
        assert torch.equal(leaves[place].grad, whole[place].grad)


def check_layer(parts: tuple[Callable[..., Any], ...], dtype: torch.dtype, ids_Tk: Tensor) -> None:
    """Dispatch, experts and combine in a row, with gradients of x, the weights of tokens and of experts."""
    dispatch, experts, combine = parts
    (T, k), X, C, F = ids_Tk.shape, 6, 32, 16
    inputs = [
        randn(T, C, dtype=dtype, seed=0), randn(T, k, dtype=torch.float32, seed=3).abs(),
        *weights_of(X, C, F, dtype),
    ]  # fmt: skip
    if dtype == torch.float64:
        inputs[1] = inputs[1].double()

    def run(x: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows_RC, counts_X, record = dispatch(x, ids_Tk, num_experts=X, group=None)
        assert counts_X.dtype == torch.int64
        assert counts_X.tolist() == [int((ids_Tk == e).sum()) for e in range(X)]
        pairs = [(e, t) for e in range(X) for t in range(T) for j in range(k) if int(ids_Tk[t, j]) == e]
        assert torch.equal(rows_RC, x[[t for _, t in pairs]])  # sorted by expert, tokens in order
        return combine(experts(rows_RC, gate_up, down, counts_X), w, record)

    copies = [x.clone() for x in inputs]
    got = oracle.with_grads(run, inputs)
    wanted = oracle.with_grads(lambda x, w, g, d: layer(x, ids_Tk, w, g, d), [x.double() for x in inputs])
    oracle.assert_close(got, wanted, dtype)
    assert got[0].dtype == dtype and got[2].dtype == inputs[1].dtype
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


IDS = {
    "usual": random_ids(7, 6, 3),
    "k is 1": random_ids(9, 6, 1),
    "k is all": random_ids(4, 6, 6),
    "one token": random_ids(1, 6, 2),
    "no tokens": random_ids(0, 6, 2),
    "all to one expert": torch.full((8, 1), 4),
    "many": random_ids(90, 6, 2),
}


def check_combine_rounds_once(dispatch: Callable[..., Any], combine: Callable[..., Tensor]) -> None:
    """Weights keep float32 and sums are rounded to bfloat16 once, in both directions."""
    ids_Tk = random_ids(5, 6, 3)
    x = randn(5, 32, dtype=torch.bfloat16, seed=0).requires_grad_()
    weights = randn(5, 3, dtype=torch.float32, seed=1).requires_grad_()
    rows_RC, _, record = dispatch(x, ids_Tk, num_experts=6, group=None)
    y = combine(rows_RC, weights, record)
    exact = (x.double()[:, None] * weights.double()[..., None]).sum(1)
    # Half a bfloat16 step of the result and float32 rounding of three terms of size up to 10.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)
    y.sum().backward()
    g_weights = x.detach().double().sum(1, keepdim=True).expand(5, 3)
    torch.testing.assert_close(weights.grad.double(), g_weights, rtol=1e-5, atol=1e-5)


def check_refusals(dispatch: Callable[..., Any], experts: Callable[..., Any]) -> None:
    x = torch.zeros(2, 32)
    for ids in ([[0], [6]], [[0], [-1]]):
        with pytest.raises((ValueError, RuntimeError)):
            dispatch(x, torch.tensor(ids), num_experts=6, group=None)
    for counts in ([1, 2, 0], [1, 1], [3, -1, 0]):
        with pytest.raises((ValueError, RuntimeError)):
            experts(x, torch.zeros(3, 32, 32), torch.zeros(3, 32, 16), torch.tensor(counts))
