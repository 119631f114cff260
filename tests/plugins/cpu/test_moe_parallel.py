"""Experts over two real processes equal one process, forward and backward."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import moe_checks as check
import pytest
import torch
from test_gloo import TIMEOUT, results, start

from grpo_core.ops.reference import moe as reference
from grpo_cpu import moe as tuned
from grpo_cpu.collectives import Gloo
from grpo_cpu.native import compiler, cpu_flags
from grpo_cuda import moe as on_cuda

X, C, F, K = 6, 32, 16, 3
PARTS = {
    "reference": (reference.dispatch, reference.experts, reference.combine),
    "torch": (tuned.dispatch, tuned.experts, tuned.combine),
    "torch on CUDA": (on_cuda.dispatch, on_cuda.experts, on_cuda.combine),
}
if "avx512_bf16" in cpu_flags() and compiler() is not None:
    native = importlib.import_module("grpo_cpu.native_moe")
    PARTS["native"] = (native.dispatch, native.experts, native.combine)
IDS = {
    "uneven": [check.random_ids(5, X, K), check.random_ids(2, X, K, seed=1)],
    "a rank without tokens": [check.random_ids(0, X, K), check.random_ids(6, X, K)],
    "a rank without rows": [torch.tensor([[0, 2, 1], [1, 0, 2]]), torch.tensor([[2, 1, 0]])],
    "all to the other": [torch.tensor([[3, 4, 5]] * 4), torch.tensor([[0, 1, 2]] * 3)],
}


def inputs_of(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        check.randn(tokens, C, dtype=dtype, seed=0),
        check.randn(tokens, K, dtype=torch.float32, seed=3).abs(),
        *check.weights_of(X, C, F, dtype),
        check.randn(tokens, C, dtype=dtype, seed=4),
    ]  # fmt: skip


def run(parts: Any, ids_Tk: torch.Tensor, inputs: list[torch.Tensor], group: Any) -> list[torch.Tensor]:
    """y and the gradients of x, of the tokens' weights, gate_up and down."""
    dispatch, experts, combine = parts
    x, weights, gate_up, down = (t.clone().requires_grad_() for t in inputs[:4])
    rows, counts, record = dispatch(x, ids_Tk, num_experts=X, group=group)
    y = combine(experts(rows, gate_up, down, counts), weights, record)
    y.backward(inputs[4])
    return [y.detach(), *(t.grad for t in (x, weights, gate_up, down))]


def on_a_rank(comm: Gloo, rank: int) -> dict[tuple[str, str, torch.dtype], list[torch.Tensor]]:
    group = comm.group([0, 1])
    found = {}
    for case, (first, second) in IDS.items():
        for name, parts in PARTS.items():
            for dtype in (torch.float32, torch.bfloat16):
                whole = inputs_of(len(first) + len(second), dtype)
                mine = slice(0, len(first)) if rank == 0 else slice(len(first), None)
                block = slice(rank * X // 2, (rank + 1) * X // 2)
                cuts = (mine, mine, block, block, mine)
                local = [t[cut] for t, cut in zip(whole, cuts, strict=True)]
                found[case, name, dtype] = run(parts, (first, second)[rank], local, group)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, list[torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("moe")
    return results(start(on_a_rank, 2, f"file://{folder}/store", TIMEOUT, folder / "out"), folder / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("case", IDS)
def test_two_processes_equal_one(
    case: str, name: str, dtype: torch.dtype, found: list[dict[Any, list[torch.Tensor]]]
) -> None:
    ids_Tk = torch.cat(IDS[case])
    wanted = run(PARTS[name], ids_Tk, inputs_of(len(ids_Tk), dtype), None)
    both = [rank[case, name, dtype] for rank in found]
    for place, want in enumerate(wanted):
        # Rows of an expert come in the same order as in one process: the same products, to the bit.
        assert torch.equal(torch.cat([got[place] for got in both]), want), place


def uneven_experts(comm: Gloo, rank: int) -> str:
    try:
        reference.dispatch(
            torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64), num_experts=5, group=comm.group([0, 1])
        )
    except ValueError as error:
        return str(error)
    return ""


def test_experts_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    messages = results(start(uneven_experts, 2, f"file://{tmp_path}/store", TIMEOUT, out), out)
    assert messages == ["5 experts cannot be shared out over 2 ranks"] * 2
