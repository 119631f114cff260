"""What is wrong with a stream of named tensors, collected to be told all at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError

SHOWN = 6
"""Names listed for one kind of trouble before the rest is only counted."""


class WeightReport:
    """Holds names, shapes and values against the table of a model.

    `shapes`: every tensor that must come. `wholes`: a name that stands for several of them, with its shape.
    `tied`: names that may come beside their equals. `kept`: names that may come or not. `ignored`: endings
    of names that mean nothing.
    """

    def __init__(
        self, *, shapes: Mapping[str, tuple[int, ...]],
        wholes: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
        tied: Mapping[str, str], kept: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.shapes, self.wholes, self.tied, self.kept, self.ignored = shapes, wholes, tied, kept, ignored
        self.seen: set[str] = set()
        self.troubles: dict[str, list[str]] = {}

    def add(self, trouble: str, name: str) -> None:
        """Note one name under one kind of trouble."""
        self.troubles.setdefault(trouble, []).append(name)

    def place(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor belongs into the decoder and fits there."""
        if name.endswith(self.ignored):
            return False
        wanted, names = self.wholes.get(name) or (self._wanted(name), (name,))
        if wanted is None:
            self.add("unknown to the model", name)
            return False
        if self.seen.intersection(names):
            self.add("given twice", name)
            return False
        self.seen.update(names)
        if tuple(shape) != wanted:
            self.add("of another shape", f"{name} {list(shape)} instead of {list(wanted)}")
            return False
        return name not in self.kept

    def _wanted(self, name: str) -> tuple[int, ...] | None:
        return self.kept[name] if name in self.kept else self.shapes.get(self.tied.get(name, name))

    def sound(self, name: str, tensor: Tensor) -> bool:
        """Whether the values can be weights."""
        if not tensor.is_floating_point():
            self.add("not of a floating dtype (a quantised checkpoint?)", f"{name} {tensor.dtype}")
            return False
        if not is_finite(tensor):
            self.add("holding NaN or infinity", name)
            return False
        return True

    def close(self) -> None:
        """Raises `CheckpointError` where anything was missing or noted."""
        missing = [name for name in self.shapes if name not in self.seen]
        if missing:
            self.troubles = {"missing": missing, **self.troubles}
        if not self.troubles:
            return
        counted = sum(len(names) for names in self.troubles.values())
        raise CheckpointError(
            f"the weights do not fit the model: {counted} {'name' if counted == 1 else 'names'}",
            why="; ".join(f"{trouble}: {_listed(names)}" for trouble, names in self.troubles.items()),
            fix="check that config.json and the weights belong together and that the download is complete",
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; reads the tensor once and allocates nothing of its size."""
    # A sum is finite only if every element is; one that overflows is looked at element by element.
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return math.isfinite(total.item()) or bool(torch.isfinite(tensor).all())


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
