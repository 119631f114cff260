"""The references of torch_npu's operations against independent formulas in float64, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from grpo_conformance.cann.ops import products, references

OPS = references()
# float32 against float64: sums of up to a hundred terms of size one.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def agree(got: Tensor, want: Tensor | None) -> None:
    assert want is not None
    torch.testing.assert_close(got.double(), want.double(), **CLOSE)


def causal_mask() -> Tensor:
    return torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)


def test_rms_norm_and_its_gradient() -> None:
    torch.manual_seed(0)
    x, gamma, dy = torch.randn(3, 5, 8), torch.randn(8), torch.randn(3, 5, 8)
    y, rstd = OPS["npu_rms_norm"](x, gamma, 1e-5)
    a, b = wide(x, gamma)
    want = functional.rms_norm(a, (8,), b, 1e-5)
    agree(y, want)
    assert rstd.dtype == torch.float32 and rstd.shape == (3, 5, 1)
    ga, gb = torch.autograd.grad(want, (a, b), dy.double())
    got = OPS["npu_rms_norm_backward"](dy, x, gamma, rstd)
    agree(got[0], ga)
    agree(got[1], gb)


def test_swiglu_and_its_gradient() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(4, 10), torch.randn(4, 5)
    (a,) = wide(x)
    want = functional.silu(a[:, :5]) * a[:, 5:]
    agree(OPS["npu_swiglu"](x), want)
    agree(OPS["npu_swiglu_backward"](dy, x), torch.autograd.grad(want, a, dy.double())[0])


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_and_its_gradients(mode: str) -> None:
    torch.manual_seed(0)
    x, dy, cos, sin = (
        torch.randn(1, 6, 3, 8),
        torch.randn(1, 6, 3, 8),
        torch.randn(1, 6, 1, 8),
        torch.randn(1, 6, 1, 8),
    )
    a, c, s = wide(x, cos, sin)
    # As complex numbers: the partner of each place is its neighbour, or the one half a head away.
    swap = [4, 5, 6, 7, 0, 1, 2, 3] if mode == "half" else [1, 0, 3, 2, 5, 4, 7, 6]
    sign = torch.tensor([-1.0] * 4 + [1.0] * 4 if mode == "half" else [-1.0, 1.0] * 4, dtype=torch.float64)
    want = c * a + s * (a[..., swap] * sign)
    agree(OPS["npu_rotary_mul"](x, cos, sin, mode), want)
    grads = torch.autograd.grad(want, (a, c, s), dy.double())
    for got, expected in zip(OPS["npu_rotary_mul_backward"](dy, x, cos, sin, mode), grads, strict=True):
        agree(got, expected)


def test_more_than_a_thousand_tokens_are_turned_in_a_batch_of_one() -> None:
    x, angles = torch.ones(1, 2048, 8, 4), torch.ones(1, 2048, 1, 4)
    assert OPS["npu_rotary_mul"](x, angles, 0 * angles, "half").equal(x)


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((4,), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2)), ((4,), (4,))],
)
def test_gradients_of_products(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(left), torch.randn(right)
    x, y = wide(a, b)
    want = x @ y
    up = torch.randn(want.shape)
    for got, expected in zip(
        products.matmul_backward(up, a, b, [True, True]),
        torch.autograd.grad(want, (x, y), up.double()),
        strict=True,
    ):
        assert got is not None
        agree(got, expected)
    assert products.matmul_backward(up, a, b, [False, False]) == (None, None)


def test_gradients_of_linear_and_of_repetitions() -> None:
    torch.manual_seed(0)
    x, w, up = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(2, 3, 5)
    a, b, c = wide(x, w, torch.randn(5))
    grads = torch.autograd.grad(functional.linear(a, b, c), (a, b, c), up.double())
    for got, expected in zip(products.linear_backward(x, up, w, [True] * 3), grads, strict=True):
        assert got is not None
        agree(got, expected)
    for repeats, dim in ((2, 1), (torch.tensor([0, 3, 1]), 1), (3, None)):
        want = a.repeat_interleave(repeats, dim)
        up = torch.randn(want.shape)
        got = products.repeat_interleave_backward(up, x, repeats, dim)
        agree(got, torch.autograd.grad(want, a, up.double())[0])


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(7), [torch.randn(7) for _ in range(4)]
    ours, m, v = start.clone(), torch.zeros(7), torch.zeros(7)
    theirs = start.double().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step, grad in enumerate(grads):
        theirs.grad = grad.double()
        optimizer.step()
        words = (0.9**step, 0.95**step, 0.01, 0.1, 0.9, 0.95, 1e-8, grad, None, False, False)
        out = OPS["npu_apply_adam_w.out"](*words, out=[ours, m, v])
        assert out[0] is ours
        agree(ours, theirs)


def shaped(layout: str, x_BNSD: Tensor) -> Tensor:
    if layout in ("BNSD", "TND"):
        return x_BNSD
    if layout == "BSND":
        return x_BNSD.transpose(1, 2).contiguous()
    flat = x_BNSD.transpose(1, 2).flatten(2)
    return flat if layout == "BSH" else flat.transpose(0, 1).contiguous()


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_fusion_attention_and_its_gradient_in_every_layout(layout: str, mode: int) -> None:
    torch.manual_seed(0)
    q, k, v, dy = (torch.randn(2, n, s, 8) for n, s in ((4, 5), (2, 7), (2, 7), (4, 5)))
    mask = None if mode == 0 else causal_mask()
    at = torch.arange(7)[None] - torch.arange(5)[:, None]
    keep = {0: at < 99, 2: at <= 0, 3: at <= 2, 4: (at <= 2) & (at >= 0)}[mode]
    a, b, c = wide(q, k, v)
    want = functional.scaled_dot_product_attention(a, b, c, keep, scale=0.3, enable_gqa=True)
    words: dict[str, Any] = {"atten_mask": mask, "sparse_mode": mode, "pre_tockens": 2, "next_tockens": 0}
    operands = [shaped(layout, x) for x in (q, k, v)]
    out, top, total, *_ = OPS["npu_fusion_attention"](*operands, 4, layout, scale=0.3, **words)
    agree(out, shaped(layout, want))
    assert top.shape == total.shape == (2, 4, 5, 8)
    got = OPS["npu_fusion_attention_grad"](
        *operands, shaped(layout, dy), 4, layout, scale_value=0.3, softmax_max=top, softmax_sum=total,
        attention_in=out, **words,
    )  # fmt: skip
    for ours, theirs in zip(got[:3], torch.autograd.grad(want, (a, b, c), dy.double()), strict=True):
        agree(ours, shaped(layout, theirs))


def test_packed_fusion_attention_and_its_gradient() -> None:
    torch.manual_seed(0)
    ends_q, ends_k = [3, 3, 8], [4, 6, 13]
    q, k, v, dy = torch.randn(8, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 6), torch.randn(8, 4, 6)
    a, b, c = wide(q, k, v)
    parts = []
    for (q0, q1), (k0, k1) in (((0, 3), (0, 4)), ((3, 8), (6, 13))):
        keep = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        row = [x.transpose(0, 1)[None] for x in (a[q0:q1], b[k0:k1], c[k0:k1])]
        parts.append(
            functional.scaled_dot_product_attention(*row, keep, scale=0.5, enable_gqa=True)[0].transpose(0, 1)
        )
    want = torch.cat(parts)
    words: dict[str, Any] = {
        "atten_mask": causal_mask(), "sparse_mode": 3, "actual_seq_qlen": ends_q, "actual_seq_kvlen": ends_k,
    }  # fmt: skip
    out, top, total, *_ = OPS["npu_fusion_attention"](q, k, v, 4, "TND", scale=0.5, **words)
    agree(out, want)
    assert top.shape == (8, 4, 8)
    got = OPS["npu_fusion_attention_grad"](
        q, k, v, dy, 4, "TND", scale_value=0.5, softmax_max=top, softmax_sum=total, attention_in=out, **words
    )
    for ours, theirs in zip(got[:3], torch.autograd.grad(want, (a, b, c), dy.double()), strict=True):
        agree(ours, theirs)


def paged(lengths: list[int], heads: int, dim: int, seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of each sequence, the pool that holds them in shuffled pages, and the table of pages."""
    torch.manual_seed(seed)
    rows = [torch.randn(n, heads, dim).half() for n in lengths]
    pages = -(-max(lengths) // 128)
    order = torch.randperm(len(lengths) * pages + 1)
    pool = torch.full((len(order), 128, heads, dim), torch.nan).half()
    table = order[: len(lengths) * pages].view(len(lengths), pages).to(torch.int32)
    for row, places in zip(rows, table, strict=True):
        for page, start in zip(places.tolist(), range(0, len(row), 128), strict=False):
            part = row[start : start + 128]
            pool[page, : len(part)] = part
    return rows, pool, table


def test_decode_over_pages_reads_only_what_belongs_to_a_sequence() -> None:
    lengths = [1, 130, 200]
    keys, k_pool, table = paged(lengths, 2, 16, 0)
    values = [torch.randn(n, 2, 16).half() for n in lengths]
    v_pool = torch.full_like(k_pool, torch.nan)
    for row, places in zip(values, table, strict=True):
        for index, start in enumerate(range(0, len(row), 128)):
            part = row[start : start + 128]
            v_pool[places[index], : len(part)] = part
    q = torch.randn(3, 4, 1, 16).half()
    out, lse = OPS["npu_fused_infer_attention_score"](
        q, k_pool.flatten(2), v_pool.flatten(2), actual_seq_lengths_kv=lengths, block_table=table,
        num_heads=4, scale=0.25, input_layout="BNSD", num_key_value_heads=2, block_size=128,
    )  # fmt: skip
    assert lse.shape == (1,)
    for index in range(3):
        row = [
            x.double()[None] for x in (q[index], keys[index].transpose(0, 1), values[index].transpose(0, 1))
        ]
        want = functional.scaled_dot_product_attention(*row, scale=0.25, enable_gqa=True)[0]
        # float16 results of size one.
        torch.testing.assert_close(out[index].double(), want, rtol=2e-3, atol=2e-3)


def test_writing_to_pages() -> None:
    key, value = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    pools = torch.zeros(2, 128, 2, 4), torch.zeros(2, 128, 2, 4)
    rows = torch.tensor([130, 0, 127], dtype=torch.int32)
    OPS["npu_scatter_pa_kv_cache"](key, value, *pools, rows, cache_mode="Norm")
    assert torch.equal(pools[0].flatten(0, 1)[rows.long()], key)
    assert torch.equal(pools[1].flatten(0, 1)[rows.long()], value)
    assert pools[0].count_nonzero() == key.numel()


def test_grouped_products() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 2])
    x, w = torch.randn(5, 4), torch.randn(3, 4, 6)
    words = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1}
    (y,) = OPS["npu_grouped_matmul"]([x], [w], **words)
    expert = torch.tensor([0, 0, 0, 2, 2])
    agree(y, torch.einsum("rk,rkn->rn", x.double(), w[expert].double()))
    ends = words | {"group_list": counts.cumsum(0), "group_list_type": 0}
    assert torch.equal(OPS["npu_grouped_matmul"]([x], [w], **ends)[0], y)
    dy = torch.randn(5, 6)
    (g,) = OPS["npu_grouped_matmul"]([x.t()], [dy], **words | {"split_item": 3, "group_type": 2})
    one_hot = functional.one_hot(expert, 3).double()
    agree(g, torch.einsum("rx,rk,rn->xkn", one_hot, x.double(), dy.double()))


def test_permutation_and_back_with_gradients() -> None:
    torch.manual_seed(0)
    x, probs, dy = torch.randn(6, 4), torch.rand(6, 2), torch.randn(6, 4)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(6)]).to(torch.int32)
    rows, places = OPS["npu_moe_token_permute"](x, ids)
    assert torch.equal(rows[places.long()], x.repeat_interleave(2, 0)) and places.dtype == torch.int32
    sorted_ids = torch.empty(12, dtype=torch.int32)
    sorted_ids[places.long()] = ids.reshape(-1)
    assert sorted_ids.tolist() == sorted(ids.reshape(-1).tolist())
    out = OPS["npu_moe_token_unpermute"](rows, places, probs)
    agree(out, x * probs.sum(1, keepdim=True))
    a, p = wide(rows, probs)
    want = (a[places.long()].view(6, 2, 4) * p[..., None]).sum(1)
    grads = torch.autograd.grad(want, (a, p), dy.double())
    for got, expected in zip(
        OPS["npu_moe_token_unpermute_grad"](rows, dy, places, probs), grads, strict=True
    ):
        agree(got, expected)
    up = torch.randn(12, 4)
    back = OPS["npu_moe_token_permute_grad"](x, up, ids, places)
    agree(back, up[places.long()].view(6, 2, 4).sum(1))


def test_gating_chooses_groups_before_experts() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(9, 12), torch.randn(12)
    weights, ids, scores = OPS["npu_moe_gating_top_k"](
        x, 3, bias=bias, k_group=2, group_count=4, group_select_mode=1, norm_type=1, out_flag=True
    )
    agree(scores, x.double().sigmoid())
    for row, chosen, weight in zip(x.double(), ids.tolist(), weights, strict=True):
        choice = row.sigmoid() + bias.double()
        worth = [sum(sorted(choice[3 * g : 3 * g + 3].tolist())[1:]) for g in range(4)]
        best = sorted(range(4), key=lambda g: -worth[g])[:2]
        allowed = sorted((i for g in best for i in range(3 * g, 3 * g + 3)), key=lambda i: -choice[i].item())
        assert chosen == allowed[:3]
        picked = row.sigmoid()[chosen]
        agree(weight, picked / picked.sum())


QUERY = torch.randn(4, 2, 16).half()
ONE = QUERY.unsqueeze(2)
POOL, TABLE = torch.zeros(3, 128, 32).half(), torch.zeros(4, 1, dtype=torch.int32)
KEYS = POOL.view(3, 128, 2, 16)
ROWS, WEIGHT, ANGLES = torch.ones(4, 3), torch.ones(2, 3, 5), torch.ones(1, 2, 1, 4)
PLACES = torch.arange(4, dtype=torch.int32)
INFER: dict[str, Any] = {
    "actual_seq_lengths_kv": [1] * 4, "block_table": TABLE, "num_heads": 2, "input_layout": "BNSD",
    "block_size": 128,
}  # fmt: skip
FUSE: dict[str, Any] = {"actual_seq_qlen": [4], "actual_seq_kvlen": [4]}
GROUPED: dict[str, Any] = {
    "group_list": torch.tensor([2, 2]), "split_item": 2, "group_type": 0, "group_list_type": 1,
}  # fmt: skip


def fuse(*operands: Any, **more: Any) -> Any:
    return OPS["npu_fusion_attention"](*operands, **{**FUSE, **more})


def infer(*operands: Any, **more: Any) -> Any:
    return OPS["npu_fused_infer_attention_score"](*operands, **{**INFER, **more})


def scatter(places: Tensor, **more: Any) -> Any:
    return OPS["npu_scatter_pa_kv_cache"](QUERY, QUERY, KEYS, KEYS, places, **more)


def grouped(x: Tensor, **more: Any) -> Any:
    return OPS["npu_grouped_matmul"]([x], [WEIGHT], **{**GROUPED, **more})


def test_what_the_refusals_are_variations_of_is_taken() -> None:
    fuse(QUERY, QUERY, QUERY, 2, "TND")
    fuse(QUERY, QUERY, QUERY, 2, "TND", sparse_mode=3, atten_mask=causal_mask())
    infer(ONE, POOL, POOL)
    scatter(PLACES, cache_mode="Norm")
    grouped(ROWS)


REFUSED: dict[str, Callable[[], Any]] = {
    "integer queries": lambda: fuse(QUERY.int(), QUERY.int(), QUERY.int(), 2, "TND"),
    "two dtypes": lambda: fuse(QUERY, QUERY.float(), QUERY, 2, "TND"),
    "an unknown layout": lambda: fuse(QUERY, QUERY, QUERY, 2, "THD"),
    "packed without lengths": lambda: fuse(QUERY, QUERY, QUERY, 2, "TND", actual_seq_qlen=None),
    "a zero too many": lambda: fuse(QUERY, QUERY, QUERY, 2, "TND", actual_seq_qlen=[0, 4]),
    "heads of the keys": lambda: fuse(QUERY, QUERY[:, :1], QUERY[:, :1], 1, "TND"),
    "a mask of the lengths": lambda: fuse(
        QUERY, QUERY, QUERY, 2, "TND", sparse_mode=3, atten_mask=torch.ones(4, 4, dtype=torch.bool).triu(1)
    ),
    "a mask turned round": lambda: fuse(
        QUERY, QUERY, QUERY, 2, "TND", sparse_mode=3, atten_mask=~causal_mask()
    ),
    "pages of 64": lambda: infer(ONE, POOL[:, :64].contiguous(), POOL[:, :64].contiguous(), block_size=64),
    "another block size": lambda: infer(ONE, POOL, POOL, block_size=256),
    "float32 decode": lambda: infer(ONE.float(), POOL.float(), POOL.float()),
    "int64 pages": lambda: infer(ONE, POOL, POOL, block_table=TABLE.long()),
    "queries that are a view": lambda: infer(torch.ones(2, 4, 1, 16).half().transpose(0, 1), POOL, POOL),
    "a length beyond the pages": lambda: infer(ONE, POOL, POOL, actual_seq_lengths_kv=[129] * 4),
    "the default cache mode": lambda: scatter(PLACES),
    "a place twice": lambda: scatter(torch.zeros_like(PLACES), cache_mode="Norm"),
    "a place outside": lambda: scatter(PLACES + 3 * 128, cache_mode="Norm"),
    "int32 groups": lambda: grouped(ROWS, group_list=torch.tensor([2, 2], dtype=torch.int32)),
    "groups that miss rows": lambda: grouped(torch.ones(5, 3)),
    "rows transposed": lambda: grouped(torch.ones(3, 4).t()),
    "no group type": lambda: grouped(ROWS, group_type=None),
    "weights of another dtype": lambda: OPS["npu_rms_norm"](ROWS.half(), torch.ones(3)),
    "one dimension": lambda: OPS["npu_rms_norm"](torch.ones(4), torch.ones(4)),
    "float64 halves": lambda: OPS["npu_swiglu"](torch.ones(4).double()),
    "rotary of another size": lambda: OPS["npu_rotary_mul"](torch.ones(1, 2, 2, 6), ANGLES, ANGLES),
    "an unknown rotary mode": lambda: OPS["npu_rotary_mul"](torch.ones(1, 2, 2, 4), ANGLES, ANGLES, "neox"),
    "a thousand heads": lambda: OPS["npu_rotary_mul"](torch.ones(1, 2, 1000, 4), ANGLES, ANGLES),
    "int64 places": lambda: OPS["npu_moe_token_unpermute"](ROWS, torch.arange(4)),
    "a bias of another dtype": lambda: OPS["npu_moe_gating_top_k"](ROWS, 2, bias=torch.ones(3).half()),
    "groups of two": lambda: OPS["npu_moe_gating_top_k"](torch.ones(2, 8), 2, group_count=4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_refuse(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"simulated CANN: npu_"):
        REFUSED[name]()
