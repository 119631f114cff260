"""The consistent offers against the oracles of every offer, and each row against the rows beside it."""

from __future__ import annotations

from collections.abc import Callable

import cache_checks
import delta_checks
import latent_checks
import moe_checks
import op_checks
import pytest
import sample_checks
import torch
from torch import Tensor

from grpo_core.devices.cpu import Cpu
from grpo_core.impl import Need
from grpo_core.ops.reference import attention as core
from grpo_core.ops.reference import fused, moe
from grpo_core.ops.reference.mla import DenseLatentCache
from grpo_cpu import (
    consistent,
    consistent_attention,
    consistent_fused,
    consistent_logprob,
    consistent_moe,
    consistent_recurrent,
    native_offers,
)
from grpo_cpu import consistent_mla as mla

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[(64, 1 << 23), (4, 1)], ids=["whole", "blocks of four keys, one unit at a time"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks cut the same small cases into several."""
    keys, elements = request.param
    monkeypatch.setattr(consistent_attention, "KEYS", keys)
    monkeypatch.setattr(consistent_attention, "ELEMENTS", elements)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", op_checks.LENGTHS)
def test_packed_attention(case: str, window: int | None, dtype: torch.dtype) -> None:
    op_checks.check_shared_prefix(consistent_attention.shared_prefix, case, dtype, window)
    for causal in (True, False):
        op_checks.check_varlen(consistent_attention.varlen, case, dtype, window, causal)


def test_layers_of_another_cache_are_refused() -> None:
    one, at = torch.ones(1, 2, 4), torch.tensor([0])
    with pytest.raises(TypeError, match="layers of DenseCache"):
        consistent_attention.decode(one, object(), seqlens_k=at + 1, slots=at, scale=1.0, window=None)
    with pytest.raises(TypeError, match="layers of DenseLatentCache"):
        mla.decode(one, one, object(), one, one, seqlens_k=at + 1, slots=at, scale=1.0)


def test_bad_packing_is_refused() -> None:
    op_checks.check_bad_packing(consistent_attention.varlen, consistent_attention.shared_prefix)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_attention(dtype: torch.dtype) -> None:
    cache_checks.check_generation(
        cache_checks.Model(
            cache=core.DenseCache(cache_checks.spec(dtype)), decode=consistent_attention.decode,
            prefill=consistent_attention.prefill, dtype=dtype,
        )
    )  # fmt: skip


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention(dtype: torch.dtype) -> None:
    for tree in latent_checks.TREES.values():
        latent_checks.check_varlen(mla.varlen, dtype, *tree)
    latent_checks.check_varlen(mla.varlen, dtype, [5, 0, 7], None)
    cache = DenseLatentCache(latent_checks.latent_spec(cache_checks.spec(dtype)))
    model = latent_checks.LatentModel(cache=cache, decode=mla.decode, prefill=mla.prefill, dtype=dtype)
    cache_checks.check_generation(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recurrent_ops(dtype: torch.dtype) -> None:
    for lengths in delta_checks.LENGTHS.values():
        delta_checks.check_chunk(consistent_recurrent.chunk, dtype, lengths, decay=0.1)
        delta_checks.check_conv(consistent_recurrent.conv_varlen, dtype, lengths)
    for sequences in (0, 1, 5):
        delta_checks.check_step(consistent_recurrent.step, dtype, sequences)
    delta_checks.check_conv_step(consistent_recurrent.conv_step, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype: torch.dtype) -> None:
    for case in moe_checks.COUNTS:
        for size in moe_checks.SIZES:
            moe_checks.check_experts(consistent_moe.experts, dtype, case, *size)
    moe_checks.check_main_grads(consistent_moe.experts, dtype, "uneven", 64, 48)
    parts = (moe.dispatch, consistent_moe.experts, consistent_moe.combine)
    for ids in moe_checks.IDS.values():
        moe_checks.check_layer(parts, dtype, ids)


def test_routes() -> None:
    for case in moe_checks.ROUTES:
        for score, norm in (("sigmoid", True), ("sigmoid", False), ("softmax", True), ("softmax", False)):
            for dtype in (torch.float32, torch.float64):
                moe_checks.check_routes(consistent_moe.route, 9, case, norm=norm, score=score, dtype=dtype)
    moe_checks.check_route_at_the_ends(consistent_moe.route)
    moe_checks.check_route_refusals(consistent_moe.route)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_ops(dtype: torch.dtype) -> None:
    op_checks.check_swiglu(consistent_fused.swiglu, dtype)
    for tokens, vocab in ((1, 1), (23, 40), (70, 5000), (0, 5)):
        op_checks.check_logprob(consistent_logprob.logprob, dtype, tokens, vocab)
    op_checks.check_logprob_refuses(consistent_logprob.logprob)


def test_drawing() -> None:
    impl = consistent_logprob.sample_token
    sample_checks.check_inverse_of_the_distribution(impl, 300, torch.float32, 0.6, 7, 0.8, 0.0)
    for check in (
        sample_checks.check_frequencies, sample_checks.check_edges, sample_checks.check_infinities,
        sample_checks.check_rows_of_different_kinds,
    ):  # fmt: skip
        check(impl)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("main_grad", [False, True])
def test_linear_and_its_gradients(main_grad: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((70, 33), (17, 33), (17,)))
    found = []
    for linear, dtype in (
        (consistent_fused.linear_dense, torch.float32),
        (fused.linear_dense, torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        total = torch.ones(17, 33, dtype=dtype) if main_grad else None
        y = linear(leaves[0], leaves[1], leaves[2] if bias else None, main_grad_NK=total)
        y.square().sum().backward()
        grads = [leaves[0].grad, total if main_grad else leaves[1].grad, leaves[2].grad if bias else None]
        assert not main_grad or leaves[1].grad is None
        found.append([y.detach(), *(g for g in grads if g is not None)])
    for one, other in zip(*found, strict=True):
        # Sums of 33 to 70 float32 products.
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    packed = consistent_fused.ConsistentLinear(w.float(), b.float() if bias else None)
    assert torch.equal(packed(x.float()), found[0][0])


def alone(function: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    """Each row's bits are the same among any others, in any place."""
    whole = function(rows)
    for count, seed in ((1, 0), (2, 1), (33, 2), (len(rows) - 1, 3)):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
        assert torch.equal(function(rows[chosen]), whole[chosen]), count


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("K", "N"), [(33, 17), (64, 96), (576, 192), (20, 1), (7, 1000)])
def test_a_product_treats_every_row_alike(K: int, N: int, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(K)
    rows, w = (torch.randn(n, K, generator=generator).to(dtype) for n in (100, N))
    # In a trainer weights are parts of one buffer and start anywhere.
    shifted = torch.zeros(N * K + 3, dtype=dtype)[3:].view(N, K).copy_(w)
    try:
        alone(lambda x: consistent.product(x, w), rows)
        assert torch.equal(consistent.product(rows, shifted), consistent.product(rows, w))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_other_ops_stand_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (3 * torch.randn(90, 74, generator=generator)).to(dtype)
    head = torch.randn(50, 37, generator=generator).to(dtype)
    alone(consistent_fused.swiglu, rows)
    alone(lambda x: logprob_of_seven(x, head), rows[:, :37])
    w_uk = latent_checks.weights(dtype)[0]
    alone(lambda x: consistent.by_head(x.view(-1, w_uk.shape[0], w_uk.shape[1]), w_uk.mT),
          torch.randn(90, w_uk.shape[0] * w_uk.shape[1], generator=generator).to(dtype))  # fmt: skip
    settings = {"top_k": 3, "bias_X": None, "num_groups": 2, "topk_groups": 1, "norm": True, "scale": 1.5}
    for score in ("sigmoid", "softmax"):
        alone(lambda x, s=score: consistent_moe.route(x, score=s, ids_Tk=None, **settings)[0], rows.float())


def logprob_of_seven(x: Tensor, head: Tensor) -> Tensor:
    logprob, entropy = consistent_logprob.logprob(
        x, head, torch.full((len(x),), 7), temperature=0.7, group=None
    )
    return torch.stack([logprob, entropy], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_native_ops_that_serve_with_them_stand_alone(dtype: torch.dtype) -> None:
    if native_offers.refuse(Cpu().probe().info, Need(op="norm.rms")):
        pytest.skip("the C++ pack needs AVX512-BF16 and a compiler")
    from grpo_cpu import native_ops

    generator = torch.Generator().manual_seed(0)
    rows = (3 * torch.randn(90, 74, generator=generator)).to(dtype)
    w = torch.randn(37, generator=generator).to(dtype)
    alone(native_ops.swiglu, rows)

    def norm(x: Tensor) -> Tensor:
        x, residual = x.chunk(2, 1)
        y, total = native_ops.rms_norm(x, w, eps=1e-6, residual=residual, zero_centered=False)
        return torch.cat(
            [y, total, native_ops.rms_norm(x, w, eps=1e-6, residual=None, zero_centered=True)], 1
        )

    def turn(x: Tensor, interleaved: bool) -> Tensor:
        q, k, angles = x[:, :50].view(-1, 2, 25), x[:, 50:].view(-1, 1, 24), x[:, :11].float()
        turned = native_ops.rope_apply(q, k, angles.cos(), angles.sin().contiguous(), interleaved=interleaved)
        return torch.cat([part.flatten(1) for part in turned], 1)

    alone(norm, rows)
    for interleaved in (False, True):
        alone(lambda x, i=interleaved: turn(x, i), rows)
