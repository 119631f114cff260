"""Asks an implementation a question several times over and judges what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..case import Outcome, failed, passed
from .buffers import bits, damage, guard_all
from .question import Question, Tensors, laid_out, of_draw, seeded
from .tolerance import Gap, gaps

WEIGHTS_SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Results by name, gradients among them as "gradient of <input>", on the host."""

    values: dict[str, Tensor]
    wrong: str = ""
    """What the call did besides answering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an offer has declared about its calls."""

    device: torch.device
    backward: bool = False
    deterministic: bool = False
    threads: int = 0
    """Of the host, for the implementation alone; 0 for as many as all else has."""
    float64: bool = True
    """Whether the device has it; else such inputs (the draws of a sampler) come in float32."""


def examine(implementation: Any, questions: Iterable[Question], reference: Any, terms: Terms) -> Outcome:
    """The worst outcome of all questions: the first failure, or the pass nearest to its tolerance."""
    best: Outcome | None = None
    for question in questions:
        outcome = ask(implementation, question, reference, terms)
        if outcome.status != "pass":
            return outcome
        if best is None or _share(outcome) > _share(best):
            best = outcome
    return best or passed()


def ask(implementation: Any, question: Question, reference: Any, terms: Terms) -> Outcome:
    """Forward alone, then twice with gradients where they are declared; each answer must be right."""
    backward = terms.backward and bool(question.differentiable)
    host = torch.device("cpu")
    wanted = answer_of(_oracle(question), _widened(question), host, backward).values
    sample = question.reference or reference
    honest = replace(question, poison={}, padded=())
    theirs = answer_of(sample, honest, host, backward).values
    rounds = [("first call", False), ("second call", backward)]
    rounds += [("third call", True)] if backward else []
    given = question if terms.float64 else _lowered(question)
    before: Answer | None = None
    worst: Outcome | None = None
    for name, grads in rounds:
        few = torch.get_num_threads()
        torch.set_num_threads(terms.threads or few)
        try:
            answer = answer_of(implementation, given, terms.device, grads)
        finally:
            torch.set_num_threads(few)
        outcome = judge(question, answer, wanted, theirs, name)
        if outcome.status != "pass":
            return outcome
        worst = outcome if worst is None or _share(outcome) > _share(worst) else worst
        # A pass without gradients may be another program than one with them.
        if before is not None and terms.deterministic and before.values.keys() == answer.values.keys():
            differing = _differing(before, answer)
            if differing:
                return _told(question, f"{name}: {differing} has other bits than before, and the offer is "
                                       "declared deterministic")  # fmt: skip
        before = answer
    assert worst is not None
    return worst


def answer_of(implementation: Any, question: Question, device: torch.device, backward: bool) -> Answer:
    """Call once, on fresh copies of the inputs between guard bands."""
    guarded = guard_all(_poisoned(question), device, question.padded)
    tensors = {name: one.tensor for name, one in guarded.items()}
    if backward:
        for name in question.differentiable:
            tensors[name].requires_grad_()
    with torch.set_grad_enabled(backward):
        outputs = laid_out(question.call(implementation, tensors))
    returned = question.names[: len(question.names) - len(question.written)]
    if len(outputs) != len(returned):
        return Answer(values={}, wrong=f"{len(outputs)} tensors are returned, not {len(returned)}")
    named = dict(zip(returned, outputs, strict=True))
    gradients = _gradients(question, named, tensors) if backward else {}
    after = dict(zip(question.names[len(returned) :], question.written, strict=True))
    values = {name: x.detach().cpu() for name, x in named.items()}
    values |= {name: tensors[given].detach().cpu() for name, given in after.items()}
    return Answer(values=values | gradients, wrong=damage(guarded, (*question.written, *question.spent)))


def _lowered(question: Question) -> Question:
    narrow = {name: x.float() if x.dtype == torch.float64 else x for name, x in question.tensors.items()}
    return replace(question, tensors=narrow)


def judge(
    question: Question, answer: Answer, wanted: dict[str, Tensor], theirs: dict[str, Tensor], when: str
) -> Outcome:
    """One answer against the oracle, result by result."""
    if answer.wrong:
        return _told(question, f"{when}: {answer.wrong}")
    worst: tuple[Gap, str] | None = None
    for name, got in answer.values.items():
        right, model = wanted[name], theirs[name]
        if got.shape != right.shape or got.dtype != model.dtype:
            return _told(question, f"{when}: {name} is {got.dtype} {tuple(got.shape)}, not {model.dtype} "
                                   f"{tuple(right.shape)}")  # fmt: skip
        parts = _judged(question, name, (got, right, model))
        if parts is None:
            continue
        got, right, model = parts
        if not right.is_floating_point():
            if not torch.equal(got, right):
                return _unequal(question, f"{when}: {name}", got, right)
            continue
        dtype = got.dtype if question.own_rounding else question.dtype
        magnitude = question.magnitudes.get(name, 0.0)
        for gap in gaps(got.double(), right, model.double(), dtype, magnitude):
            if not gap.error <= gap.tolerance:
                return _beyond(question, f"{when}: {name}", gap, got, right)
            if worst is None or gap.share > worst[0].share:
                worst = (gap, name)
    if worst is None:
        return passed()
    gap, name = worst
    return passed(
        error=gap.error,
        tolerance=gap.tolerance,
        worst={
            "shape": question.label,
            "result": name,
            "measure": gap.measure,
            "seed": of_draw(question.seed),
        },
    )


def _oracle(question: Question) -> Callable[..., Any]:
    return question.oracle


def _widened(question: Question) -> Question:
    """The question to the oracle: float64, clean, called as it is."""
    wide = {n: x.double() if x.is_floating_point() else x for n, x in question.tensors.items()}
    return replace(
        question, tensors=wide, call=lambda oracle, given: oracle(given), written=(), poison={}, padded=()
    )


def _poisoned(question: Question) -> Tensors:
    tensors = dict(question.tensors)
    for name, index in question.poison.items():
        tensors[name] = tensors[name].clone()
        tensors[name][index] = torch.nan
    return tensors


def _gradients(question: Question, outputs: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """Of a fixed weighting of the results; an input that no gradient reaches has zeros."""
    leaves = [tensors[name] for name in question.differentiable]
    generator, results, weights = seeded(WEIGHTS_SEED), [], []
    for output in outputs.values():
        # Eighths are the same numbers in every dtype.
        eighths = torch.randint(-4, 5, output.shape, generator=generator) / 8
        if output.requires_grad:
            results.append(output)
            weights.append(eighths.to(output.dtype).to(output.device))
    grads: Iterable[Tensor | None] = [None] * len(leaves)
    if results:
        grads = torch.autograd.grad(results, leaves, weights, allow_unused=True)
    pairs = zip(question.differentiable, leaves, grads, strict=True)
    return {
        f"gradient of {name}": (torch.zeros_like(leaf) if grad is None else grad).detach().cpu()
        for name, leaf, grad in pairs
    }


def _judged(question: Question, name: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if question.judged is None:
        return tensors
    if name not in question.judged:
        return None
    index = question.judged[name]
    return tuple(x[index] for x in tensors)


def _differing(first: Answer, second: Answer) -> str:
    for name, x in first.values.items():
        y = second.values[name]
        if not torch.equal(bits(x), bits(y)):
            return name
    return ""


def _told(question: Question, message: str, **found: Any) -> Outcome:
    inputs = {"shape": question.label, "seed": of_draw(question.seed), "inputs": question.sizes()}
    return failed(f"{question.label}: {message}", worst={**inputs, **found.pop("worst", {})}, **found)


def _beyond(question: Question, what: str, gap: Gap, got: Tensor, wanted: Tensor) -> Outcome:
    values = {"index": list(gap.at), "got": float(got[gap.at]), "wanted": float(wanted[gap.at])}
    return _told(
        question,
        f"{what}: {gap.measure} error {gap.error:.3g} above {gap.tolerance:.3g}",
        error=gap.error,
        tolerance=gap.tolerance,
        worst={"result": what, "measure": gap.measure, **values},
    )


def _unequal(question: Question, what: str, got: Tensor, wanted: Tensor) -> Outcome:
    at = tuple((got != wanted).nonzero()[0].tolist())
    values = {"index": list(at), "got": int(got[at]), "wanted": int(wanted[at])}
    return _told(question, f"{what} at {list(at)} is {values['got']}, not {values['wanted']}",
                 worst={"result": what, **values})  # fmt: skip


def _share(outcome: Outcome) -> float:
    if outcome.error is None or not outcome.tolerance:
        return 0.0
    return outcome.error / outcome.tolerance
