"""The conformance suite on the simulated NPU: the plugin's functions pass, planted errors do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_conformance.case import Outcome
from grpo_conformance.ops.examine import Terms, examine
from grpo_conformance.ops.table import FAMILIES
from grpo_core.backend import import_pointer
from grpo_core.ops.contract import CONTRACTS


def asked(op: str, function: Any, shape: str, dtype: str = "float32") -> Outcome:
    """The outcome of one shape on the NPU, for a function with usual sizes."""
    family = FAMILIES[op]
    facts = {name: values[0] for name, values in family.axes.items()} | dict(family.shapes[shape])
    assert family.questions is not None
    terms = Terms(device=torch.device("npu", 0), backward=CONTRACTS[op].backward, deterministic=True)
    questions = family.questions(op, shape, facts, dtype)
    return examine(function, questions, import_pointer(str(CONTRACTS[op].reference)), terms)


def lossy_experts(rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor) -> Tensor:
    """The vendor's grouped product as it is: without an `autograd.Function` around it."""
    import torch_npu

    words: dict[str, Any] = {"group_list": counts_X, "split_item": 2, "group_type": 0, "group_list_type": 1}
    (gate_up,) = torch_npu.npu_grouped_matmul([rows_RC], [gate_up_XGC.transpose(1, 2)], **words)
    hidden = torch_npu.npu_swiglu(gate_up, dim=-1)
    out: Tensor = torch_npu.npu_grouped_matmul([hidden], [down_XCF.transpose(1, 2)], **words)[0]
    return out


def plugin(module: str, name: str) -> Callable[..., Any]:
    served: Callable[..., Any] = import_pointer(f"grpo_ascend.{module}:{name}")
    return served


def test_the_plugins_experts_pass() -> None:
    shape = next(iter(FAMILIES["moe.experts"].shapes))
    assert asked("moe.experts", plugin("moe", "experts"), shape).status == "pass"


def test_a_missing_backward_is_found() -> None:
    shape = next(iter(FAMILIES["moe.experts"].shapes))
    outcome = asked("moe.experts", lossy_experts, shape)
    assert outcome.status in ("fail", "error") and "grad" in outcome.message


def cut_off(gate_up: Tensor) -> Tensor:
    """Right numbers, and no gradient."""
    out: Tensor = plugin("mlp", "swiglu")(gate_up)
    return out.detach()


def test_a_backward_that_is_cut_off_is_found() -> None:
    shape = next(iter(FAMILIES["mlp.swiglu"].shapes))
    outcome = asked("mlp.swiglu", cut_off, shape)
    assert outcome.status in ("fail", "error") and "grad" in outcome.message


def left_up(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    """Packed as one sequence: forgets where the others begin."""
    cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    return plugin("fusion", "varlen")(q, k, v, **{**rest, "cu_seqlens": cu_seqlens})


def test_wrong_lengths_are_found() -> None:
    shapes = [name for name, facts in FAMILIES["attention.varlen"].shapes.items() if "ragged" in name]
    assert shapes
    assert asked("attention.varlen", plugin("fusion", "varlen"), shapes[0], "bfloat16").status == "pass"
    assert asked("attention.varlen", left_up, shapes[0], "bfloat16").status == "fail"


def swapped_halves(gate_up: Tensor) -> Tensor:
    """Takes the second half for the gate."""
    import torch_npu

    gate, up = gate_up.chunk(2, -1)
    out: Tensor = torch_npu.npu_swiglu(torch.cat([up, gate], -1), dim=-1)
    return out


@pytest.mark.parametrize(("function", "status"), [(swapped_halves, "fail"), (None, "pass")])
def test_a_layout_of_halves_turned_round_is_found(function: Any, status: str) -> None:
    shape = next(iter(FAMILIES["mlp.swiglu"].shapes))
    assert asked("mlp.swiglu", function or plugin("mlp", "swiglu"), shape).status == status
