"""Sequences that go through an op alone, and together with others in several orders: the same bits?

What is called a sequence here is whatever the contract lets a row depend on: a row itself (norms, linears),
or a packed sequence with its state.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .buffers import bits
from .facts import Facts
from .question import Tensors, seeded

SEQUENCES = (5, 1, 17, 64, 130, 3, 1, 33)
"""Tokens of the sequences of ops that see more than a row."""
ROWS = (1,) * 71


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequenced:
    """How an op is asked. Tensors are named, and what belongs to tokens or sequences has them first."""

    lengths: Sequence[int]
    rows: Callable[[Facts, torch.dtype, int, torch.Generator], dict[str, Tensor]]
    """(facts, dtype, T, generator) -> what belongs to each of T tokens."""
    call: Callable[[Sequence[Any], Tensors, Sequence[int], Facts], Sequence[Tensor | None]]
    """(implementations, tensors on the device, lengths, facts) -> results of T rows, or of one a sequence."""
    states: Callable[[Facts, torch.dtype, int, torch.Generator], dict[str, Tensor]] | None = None
    """What belongs to each sequence as a whole."""
    shared: Callable[[Facts, torch.dtype, torch.Generator], dict[str, Tensor]] | None = None
    """What all of them see: weights."""
    cuts: Mapping[str, str] | None = None
    """State that a sequence starts from -> result that its rest starts from, where it may be cut in two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The inputs of one check, on the host."""

    sequences: Sequence[Tensors]
    states: Sequence[Tensors]
    shared: Tensors


Results = list[list[Tensor]]
"""By sequence, by result."""


def draw(kind: Sequenced, facts: Facts, dtype: torch.dtype) -> Drawn:
    """All sequences with their states."""
    generator = seeded(81)
    whole = kind.rows(facts, dtype, sum(kind.lengths), generator)
    pieces = {name: torch.split(x, list(kind.lengths)) for name, x in whole.items()}
    held = kind.states(facts, dtype, len(kind.lengths), generator) if kind.states else {}
    shared = kind.shared(facts, dtype, generator) if kind.shared else {}
    many = range(len(kind.lengths))
    return Drawn(
        sequences=[{name: parts[i] for name, parts in pieces.items()} for i in many],
        states=[{name: x[i : i + 1] for name, x in held.items()} for i in many],
        shared=shared,
    )


def orders(count: int) -> Iterator[tuple[str, list[int]]]:
    """Batches that each sequence is in, with what they are called."""
    everyone = list(range(count))
    shuffled = everyone.copy()
    random.Random(4).shuffle(shuffled)
    yield "all together", everyone
    yield "all in reverse", everyone[::-1]
    yield "all shuffled", shuffled
    yield "the first half", everyone[: count // 2]
    yield "the last three", everyone[-3:]
    yield "every second", everyone[1::2]


def ask(
    kind: Sequenced, parts: Sequence[Any], drawn: Drawn, chosen: Sequence[int], facts: Facts,
    device: torch.device,
) -> Results:  # fmt: skip
    """One call with the chosen sequences, its results sorted out by sequence."""
    lengths = [kind.lengths[i] for i in chosen]
    rows = [drawn.sequences[i] for i in chosen]
    held = [drawn.states[i] for i in chosen]
    return _asked(kind, parts, rows, held, drawn.shared, lengths, facts, device)


def _asked(
    kind: Sequenced, parts: Sequence[Any], rows: Sequence[Tensors], held: Sequence[Tensors],
    shared: Tensors, lengths: Sequence[int], facts: Facts, device: torch.device,
) -> Results:  # fmt: skip
    tensors = {name: torch.cat([one[name] for one in rows]).to(device) for name in rows[0]}
    tensors |= {name: torch.cat([one[name] for one in held]).to(device) for name in held[0]}
    tensors |= {name: x.to(device, copy=True) for name, x in shared.items()}
    with torch.no_grad():
        returned = [x.detach().cpu() for x in kind.call(parts, tensors, lengths, facts) if x is not None]
    found: Results = [[] for _ in lengths]
    for result in returned:
        pieces = torch.split(result, list(lengths) if len(result) == sum(lengths) else 1)
        for one, piece in zip(found, pieces, strict=True):
            one.append(piece)
    return found


def first_difference(
    kind: Sequenced, parts: Sequence[Any], facts: Facts, dtype: torch.dtype, device: torch.device
) -> str:
    """Where a sequence has other bits in company than alone, in words; empty where it nowhere has."""
    drawn = draw(kind, facts, dtype)
    alone = [ask(kind, parts, drawn, [i], facts, device)[0] for i in range(len(kind.lengths))]
    for name, chosen in orders(len(kind.lengths)):
        for place, results in enumerate(ask(kind, parts, drawn, chosen, facts, device)):
            told = differing(alone[chosen[place]], results)
            if told:
                tokens = kind.lengths[chosen[place]]
                return f"sequence {chosen[place]} of {tokens} tokens: {name}, at place {place}: {told}"
    return _cut(kind, parts, drawn, alone, facts, device) if kind.cuts else ""


def _cut(
    kind: Sequenced, parts: Sequence[Any], drawn: Drawn, alone: Results, facts: Facts, device: torch.device
) -> str:
    """The longest sequence in two calls, the second from the state that the first ends in."""
    assert kind.cuts is not None
    longest = max(range(len(kind.lengths)), key=lambda i: kind.lengths[i])
    length = kind.lengths[longest]
    for at in (1, length // 2 + 3, length - 1):
        start = {name: x[:at] for name, x in drawn.sequences[longest].items()}
        rest = {name: x[at:] for name, x in drawn.sequences[longest].items()}
        held = drawn.states[longest]
        (first,) = _asked(kind, parts, [start], [held], drawn.shared, [at], facts, device)
        carried = {**held, **{state: first[int(place)] for state, place in kind.cuts.items()}}
        (second,) = _asked(kind, parts, [rest], [carried], drawn.shared, [length - at], facts, device)
        told = differing(alone[longest], [torch.cat([first[0], second[0]]), *second[1:]])
        if told:
            return f"a sequence of {length} tokens cut after {at}: {told}"
    return ""


def differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> str:
    """The first result with other bits."""
    for number, (x, y) in enumerate(zip(one, other, strict=True)):
        if x.shape != y.shape:
            return f"result {number} has the shape {list(y.shape)}, not {list(x.shape)}"
        changed = (bits(x) != bits(y)).view(x.numel(), -1).any(1) if x.numel() else torch.zeros(0)
        if bool(changed.any()):
            at = int(changed.nonzero()[0])
            values = x.reshape(-1)[at].item(), y.reshape(-1)[at].item()
            return (
                f"result {number} has {int(changed.sum())} other elements, the first {values[1]!r}, "
                f"alone {values[0]!r}"
            )
    return ""
