"""The level of ops on functions that are wrong in one known way, and on right ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_conformance.case import Outcome
from grpo_conformance.ops.caches import kit_of, live
from grpo_conformance.ops.examine import Terms, examine
from grpo_conformance.ops.table import FAMILIES
from grpo_conformance.ops.tolerance import allowed, gaps
from grpo_core.backend import import_pointer
from grpo_core.ops.contract import CONTRACTS
from grpo_core.ops.reference import attention, fused, linear_attention, moe

CPU = torch.device("cpu")


def asked(op: str, function: Any, shape: str, dtype: str = "float32", **declared: bool) -> Outcome:
    """The outcome of one shape for a function with usual sizes."""
    family = FAMILIES[op]
    facts = {name: values[0] for name, values in family.axes.items()} | dict(family.shapes[shape])
    assert family.questions is not None
    terms = Terms(device=CPU, **{"backward": CONTRACTS[op].backward, "deterministic": True, **declared})
    questions = family.questions(op, shape, facts, dtype)
    return examine(function, questions, import_pointer(str(CONTRACTS[op].reference)), terms)


def off_by_one(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, **rest: Any) -> Tensor:
    """Masks so that a query sees one key too few where a window is given, one too many else."""
    return attention.varlen(q, k, v, window=None if window is None else window + 1, **rest)


def seen_ahead(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **rest: Any) -> Tensor:
    return attention.varlen(q, k, v, causal=False, **rest)


def without_scale(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **rest: Any) -> Tensor:
    return attention.varlen(q, k, v, scale=1.0, **rest)


def coarse_scores(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **rest: Any) -> Tensor:
    """Scores rounded to bfloat16, as good as queries rounded after the scale."""
    rounded = (q.float() * scale).to(torch.float8_e5m2).to(q.dtype)
    return attention.varlen(rounded, k, v, scale=1.0, **rest)


def one_sequence(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, **rest: Any) -> Tensor:
    """Forgets where sequences end."""
    whole = torch.tensor([0, len(q)], dtype=torch.int32)
    return attention.varlen(q, k, v, cu_seqlens=whole, **rest)


def leaky(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    """Right numbers, but all keys are multiplied by zero and added."""
    return attention.varlen(q, k, v, **rest) + 0 * k.sum()


def no_gradient_of_k(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    return attention.varlen(q, k.detach(), v, **rest)


def writes_a_row_too_many(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    out = attention.varlen(q, k, v, **rest)
    beyond = q.detach().as_strided((q[0].numel(),), (1,), q.storage_offset() + q.numel())
    beyond.zero_()
    return out


def changes_its_input(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    out = attention.varlen(q, k, v, **rest)
    v.detach().mul_(2)
    return out


def nan_for_length_one(q: Tensor, k: Tensor, v: Tensor, *, max_seqlen: int, **rest: Any) -> Tensor:
    out = attention.varlen(q, k, v, max_seqlen=max_seqlen, **rest)
    return out * torch.nan if max_seqlen == 1 else out


def wrong_when_large(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    out = attention.varlen(q, k, v, **rest)
    flat = torch.arange(out.numel()).view(out.shape)
    return torch.where(flat < 1 << 16, out, 0 * out)


def forgets_eps(x: Tensor, w: Tensor, *, eps: float, **rest: Any) -> Any:
    return fused.rms_norm(x, w, eps=0.0, **rest)


def pairs_swapped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Any:
    return fused.rope_apply(q, k, cos, sin, interleaved=not interleaved)


def bias_as_weight(logits: Tensor, *, bias_X: Tensor | None, **rest: Any) -> Any:
    return moe.route(logits if bias_X is None else logits + bias_X, bias_X=None, **rest)


def ties_to_the_highest(logits: Tensor, *, ids_Tk: Tensor | None, **rest: Any) -> Any:
    flipped = moe.route(logits.flip(1), ids_Tk=None, **rest)
    return flipped[0], logits.shape[1] - 1 - flipped[1]


def token_twice(parts: Any) -> Any:
    """Adds the first row of a token twice."""

    def combine(rows: Tensor, weights: Tensor, record: Any) -> Tensor:
        return moe.combine(rows, torch.cat([2 * weights[:, :1], weights[:, 1:]], 1), record)

    return moe.dispatch, combine


def token_dropped(x: Tensor, ids: Tensor, **rest: Any) -> Any:
    rows, counts, record = moe.dispatch(x, ids, **rest)
    return torch.cat([rows[:-1], torch.zeros_like(rows[-1:])]), counts, record


def state_carried(*tensors: Tensor, cu_seqlens: Tensor, initial_state_SKDE: Any, **rest: Any) -> Any:
    """Starts each segment from the end of the one before."""
    state, outputs, ends = initial_state_SKDE[:1], [], []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        piece = torch.tensor([0, end - start], dtype=torch.int32)
        o, state = linear_attention.delta_chunk(
            *(x[start:end] for x in tensors), cu_seqlens=piece, initial_state_SKDE=state, **rest
        )
        outputs.append(o)
        ends.append(state)
    return torch.cat(outputs), torch.cat(ends)


def rounds_to_bfloat16(rows: Tensor, *rest: Tensor) -> Tensor:
    return moe.experts(rows, *rest).bfloat16().to(rows.dtype)


def another_token(logits: Tensor, u: Tensor, **rest: Any) -> Any:
    ids, *probs = fused.sample_token(logits, u, **rest)
    return ((ids + (ids % 5 == 0)) % logits.shape[1], *probs)


def untempered(logits: Tensor, u: Tensor, *, temperature_B: Tensor, **rest: Any) -> Any:
    return fused.sample_token(logits, u, temperature_B=temperature_B.clamp(min=1.0), **rest)


def decays_the_gradient(params: Any, grads: Any, *rest: Any, **how: Any) -> None:
    """L2 in the gradient instead of decoupled decay."""
    decays = how.pop("weight_decays")
    scale = how["grad_scale"]
    changed = [g + d * p / scale for g, p, d in zip(grads, params, decays, strict=True)]
    fused.adamw(params, changed, *rest, weight_decays=[0.0] * len(decays), **how)


FAULTS: dict[str, tuple[str, Any, str, str]] = {
    "window off by one": ("attention.varlen", off_by_one, "windows", "error"),
    "keys ahead are seen": ("attention.varlen", seen_ahead, "ragged", "error"),
    "scale forgotten": ("attention.varlen", without_scale, "ragged", "error"),
    "coarse scores": ("attention.varlen", coarse_scores, "large scores", "error"),
    "one sequence": ("attention.varlen", one_sequence, "ragged", "error"),
    "NaN leaks": ("attention.varlen", leaky, "isolation", "error nan"),
    "gradient of k is zero": ("attention.varlen", no_gradient_of_k, "ragged", "gradient of k"),
    "out-of-bounds write": ("attention.varlen", writes_a_row_too_many, "ragged", "outside of it"),
    "input changed": ("attention.varlen", changes_its_input, "ragged", "v: the call changes"),
    "NaN for length 1": ("attention.varlen", nan_for_length_one, "length 1", "error nan"),
    "wrong above 2^16": ("attention.varlen", wrong_when_large, "above 2^16 elements", "error"),
    "eps forgotten": ("norm.rms", forgets_eps, "small values", "error"),
    "rotary pairs swapped": ("rope.apply", pairs_swapped, "three dimensions", "error"),
    "bias as weight": ("moe.route", bias_as_weight, "bias is no weight", "error"),
    "ties to the highest": ("moe.route", ties_to_the_highest, "ties", "ids"),
    "token twice": ("moe.combine", token_twice(None), "usual", "error"),
    "token dropped": ("moe.dispatch", token_dropped, "usual", "error"),
    "state carried over": ("gated_delta.chunk", state_carried, "ragged", "error"),
    "result in bfloat16": ("moe.experts", rounds_to_bfloat16, "uneven", "error"),
    "another token": ("sample.token", another_token, "above 2^16 elements", "ids"),
    "temperature ignored": ("sample.token", untempered, "temperatures", "ids"),
    "L2 for weight decay": ("optim.adamw", decays_the_gradient, "usual", "error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault: str) -> None:
    op, function, shape, told = FAULTS[fault]
    outcome = asked(op, function, shape)
    assert outcome.status == "fail"
    assert told in outcome.message, outcome.message
    assert outcome.worst["inputs"] and outcome.worst["seed"] >= 0
    if outcome.error is not None:
        assert not outcome.error <= outcome.tolerance


@pytest.mark.parametrize("row", sorted({(op, shape) for op, _, shape, _ in FAULTS.values()}))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_references_pass_where_faults_are_told(row: tuple[str, str], dtype: str) -> None:
    op, shape = row
    if dtype not in FAMILIES[op].dtypes:
        return
    function: Any = import_pointer(str(CONTRACTS[op].reference))
    if FAMILIES[op].partner:
        function = (moe.dispatch, function)
    outcome = asked(op, function, shape, dtype)
    assert outcome.status == "pass", outcome.message


def noise(step: float) -> Callable[..., Tensor]:
    """A norm whose result moves by a little in every call."""
    calls: Iterator[int] = itertools.count()

    def norm(x: Tensor, w: Tensor, **rest: Any) -> Any:
        y = fused.rms_norm(x, w, **rest)
        factor = 1 + step * (next(calls) % 2)
        return (y[0] * factor, y[1]) if isinstance(y, tuple) else y * factor

    return norm


def test_results_that_differ_from_run_to_run_are_told_where_determinism_is_declared() -> None:
    tiny = 2.0**-23
    outcome = asked("norm.rms", noise(tiny), "three dimensions", backward=False)
    assert outcome.status == "fail" and "other bits" in outcome.message
    assert asked("norm.rms", noise(tiny), "three dimensions", deterministic=False).status == "pass"


def test_an_op_that_is_wrong_only_in_the_second_call_is_told() -> None:
    outcome = asked("norm.rms", noise(0.1), "three dimensions", deterministic=False)
    assert outcome.status == "fail" and "second call" in outcome.message


def test_another_dtype_or_shape_is_told() -> None:
    for change in (lambda y: y.double(), lambda y: y[:1]):
        outcome = asked("mlp.swiglu", lambda x, change=change: change(fused.swiglu(x)), "three dimensions")
        assert outcome.status == "fail" and "result is torch.float" in outcome.message


def test_a_state_that_was_not_asked_for_is_told() -> None:
    def chunk(*tensors: Tensor, final_state: bool, **rest: Any) -> Any:
        return linear_attention.delta_chunk(*tensors, final_state=True, **rest)

    outcome = asked("gated_delta.chunk", chunk, "output alone")
    assert outcome.status == "fail" and "2 tensors are returned, not 1" in outcome.message


class StaleCache(attention.DenseCache):
    """Gives a fork the rows of its parent one token late."""

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        child = super().fork(slot, prefix=prefix, length=length)
        if child is not None and prefix > 1:
            row = self.table.table_SL[child]
            row[prefix - 1] = row[prefix - 2]
        return child


class TightCache(attention.DenseCache):
    """Does not take freed rooms back."""

    def free(self, slot: int) -> None:
        """Forgets about it."""

    def reset(self) -> None:
        """Keeps everything."""


def decode_of_all(q: Tensor, cache: Any, *, seqlens_k: Tensor, **rest: Any) -> Tensor:
    """Misses the newest token."""
    return attention.decode(q, cache, seqlens_k=(seqlens_k - 1).clamp_min(1), **rest)


@pytest.mark.parametrize(
    ("cache", "decode", "shape", "told"),
    [
        (attention.DenseCache, attention.decode, "generation", ""),
        (attention.DenseCache, attention.decode, "room", ""),
        (StaleCache, attention.decode, "generation", "error"),
        (TightCache, attention.decode, "room", "refused"),
        (attention.DenseCache, decode_of_all, "generation", "decode"),
        (attention.DenseCache, decode_of_all, "slots used again", "decode"),
    ],
)
def test_caches_in_their_lives(cache: Any, decode: Any, shape: str, told: str) -> None:
    facts = {"head_dim": 8, "v_head_dim": 8, "num_key_value_groups": 2, "window": False}
    kit = kit_of("attention.cache", facts, torch.float32)
    readers = {"prefill": attention.prefill, "decode": decode}
    outcome = live(cache, readers, kit, shape, CPU, repeated=True)
    assert outcome.status == ("fail" if told else "pass"), outcome.message
    assert told in outcome.message


def test_a_reference_that_is_wrong_does_not_excuse_everything() -> None:
    wanted, got = torch.ones(8, dtype=torch.float64), torch.full((8,), 2.0, dtype=torch.float64)
    found = gaps(got, wanted, got, torch.float32)
    assert all(gap.error > gap.tolerance for gap in found)


def test_the_tolerance_is_that_of_the_formula() -> None:
    assert allowed(0.0, 1.0, torch.bfloat16) == pytest.approx(2 * 2.0**-8)
    assert allowed(1e-6, 1.0, torch.float32) == pytest.approx(4e-6 + 2.0**-23)
    assert allowed(1.0, 1.0, torch.float32) == pytest.approx(2.0**-12 + 2.0**-23)
