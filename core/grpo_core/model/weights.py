"""The frozen, invertible table between a model's neutral parameter names and a checkpoint's names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from .weight_report import WeightReport, is_finite

__all__ = ["Part", "Rule", "WeightMap", "is_finite"]

NO_NAMES: Mapping[str, str] = MappingProxyType({})
NO_SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One checkpoint tensor, and where its rows lie in the neutral parameter.

    The tensor's rows are `groups` equal runs (one for each head, say), and each run holds its share of every
    piece in turn. In the neutral parameter a piece lies together, group after group.
    """

    name: str
    pieces: tuple[tuple[int, int], ...]
    """(first row in the neutral parameter, rows of all groups together)."""
    groups: int = 1

    @property
    def rows(self) -> int:
        """Of the checkpoint tensor."""
        return sum(rows for _, rows in self.pieces)

    @property
    def plain(self) -> bool:
        """Whether the tensor is one unbroken range of the neutral parameter."""
        return self.groups == 1 and len(self.pieces) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One neutral parameter as rows of one or more checkpoint tensors."""

    neutral: str
    shape: tuple[int, ...]
    """Of the neutral parameter: its rows may be folded, [X * 2F, C] as [X, 2F, C]."""
    parts: tuple[Part, ...]
    """Together they hold every row once."""
    tail: tuple[int, ...]
    """Sizes of the checkpoint tensors after the first dimension."""
    whole: str | None = None
    """A checkpoint name under which all parts may come as one tensor of `shape` (transformers 5 keeps the
    experts of a layer so in memory); never exported."""
    float32: bool = False
    """Kept in float32 whatever the compute dtype is."""

    def hf_shape(self, part: Part) -> tuple[int, ...]:
        """Of one checkpoint tensor."""
        return (part.rows, *self.tail)

    def put(self, part: Part, tensor: Tensor, into: Tensor) -> None:
        """Copy one checkpoint tensor into its rows of the contiguous neutral tensor, cast to its dtype."""
        for mine, theirs in self._ranges(part, tensor, into):
            theirs.copy_(mine)

    def take(self, part: Part, neutral: Tensor) -> Tensor:
        """One checkpoint tensor out of the contiguous neutral one: a view, or a copy where rows move."""
        rows = neutral.view(-1, *self.tail)
        if part.plain:
            start, count = part.pieces[0]
            return rows[start : start + count]
        runs = [
            rows[start : start + count].view(part.groups, count // part.groups, *self.tail)
            for start, count in part.pieces
        ]
        return torch.cat(runs, dim=1).flatten(0, 1)

    def fill(self, given: Mapping[str, Tensor], into: Tensor) -> None:
        """Copy all parts, found by name in `given`, into the contiguous neutral tensor."""
        if self.whole is not None and self.whole in given:
            into.copy_(given[self.whole])
            return
        for part in self.parts:
            self.put(part, given[part.name], into)

    def _ranges(self, part: Part, tensor: Tensor, neutral: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = neutral.view(-1, *self.tail)
        if part.plain:
            start, count = part.pieces[0]
            yield tensor, rows[start : start + count]
            return
        runs, offset = tensor.view(part.groups, part.rows // part.groups, *self.tail), 0
        for start, count in part.pieces:
            share = count // part.groups
            theirs = rows[start : start + count].view(part.groups, share, *self.tail)
            yield runs[:, offset : offset + share], theirs
            offset += share


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """Rules of one model; built afresh for every instance.

    Loading copies into given parameters one tensor at a time, so that it needs no second copy of the model;
    exporting yields views, or copies of one tensor where rows change places.
    """

    rules: tuple[Rule, ...]
    tied: Mapping[str, str] = field(default_factory=lambda: NO_NAMES)
    """Checkpoint name that may be stored a second time -> the name whose equal it must be."""
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: NO_SHAPES)
    """Shapes of tensors that a checkpoint may hold and the decoder does not compute with (multi-token
    prediction); not loaded, and copied from the source checkpoint when the model is written."""
    kept_copies: Mapping[str, str] = field(default_factory=lambda: NO_NAMES)
    """Kept name -> the name whose current value is written in its place: a second copy of the embedding."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of names that hold no weights: old Llama checkpoints keep their rotary frequencies."""

    def hf_names(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that a checkpoint must hold, tied ones once."""
        return {part.name: rule.hf_shape(part) for rule in self.rules for part in rule.parts}

    def neutral_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the decoder, frozen ones among them."""
        return {rule.neutral: rule.shape for rule in self.rules}

    def places(self) -> dict[str, tuple[Rule, Part | None]]:
        """Checkpoint name -> its rule and part; no part where the name stands for the whole rule."""
        found: dict[str, tuple[Rule, Part | None]] = {}
        for rule in self.rules:
            found.update({part.name: (rule, part) for part in rule.parts})
            if rule.whole is not None:
                found[rule.whole] = (rule, None)
        return found

    def report(self) -> WeightReport:
        """An empty report to hold a stream of tensors against this table."""
        return WeightReport(
            shapes=self.hf_names(),
            wholes={
                rule.whole: (rule.shape, tuple(part.name for part in rule.parts))
                for rule in self.rules
                if rule.whole is not None
            },
            tied=self.tied, kept=self.kept, ignored=self.ignored,
        )  # fmt: skip

    def check(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Hold (name, shape) pairs against the table without any data.

        Raises `CheckpointError` that lists all missing, unknown, repeated and misshaped names.
        """
        report = self.report()
        for name, shape in shapes:
            report.place(name, shape)
        report.close()

    def load(self, tensors: Iterable[tuple[str, Tensor]], into: Mapping[str, Tensor]) -> None:
        """Copy checkpoint tensors into `into` (neutral name -> contiguous tensor), cast to its dtype.

        Streams: each tensor is dropped before the next is asked for, in whatever order they come. Kept
        tensors are passed over. Raises `CheckpointError` after the last one, listing all that is missing,
        unknown, repeated, misshaped, not of a floating dtype, not finite, or unequal to the weight it is
        tied to; call `check` first where nothing may be changed for names and shapes.
        """
        report, places = self.report(), self.places()
        waiting: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if report.place(name, tuple(tensor.shape)) and report.sound(name, tensor):
                if name in self.tied:
                    waiting[name] = tensor
                else:
                    _put(places[name], tensor, into)
            # The loop would hold it while the next one is read.
            del tensor
        for name, tensor in waiting.items():
            rule, part = places[self.tied[name]]
            if self.tied[name] not in report.seen or part is None:
                continue
            held = rule.take(part, into[rule.neutral].detach())
            if not torch.equal(held, tensor.to(held.device, held.dtype)):
                report.add(f"unequal to {self.tied[name]}, to which config.json ties it", name)
        report.close()

    def export(self, neutral: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of every weight, tied ones once: detached views of the parameters.

        Only where the rows of a parameter change places is the tensor a copy.
        """
        for rule in self.rules:
            parameter = neutral[rule.neutral].detach()
            for part in rule.parts:
                yield part.name, rule.take(part, parameter)

    def numel(self) -> int:
        """Numbers in all tensors of the decoder, frozen ones among them, kept ones not."""
        return sum(math.prod(rule.shape) for rule in self.rules)


def _put(place: tuple[Rule, Part | None], tensor: Tensor, into: Mapping[str, Tensor]) -> None:
    rule, part = place
    target = into[rule.neutral].detach()
    if part is None:
        target.copy_(tensor)
    else:
        rule.put(part, tensor, target)
