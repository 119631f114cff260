"""One call of an op at given sizes: its inputs, how it is called, and what it has to move and compute.

Bytes are the least traffic: every input read once, every output written once, wherever they lie. FLOPs count
a multiplication and an addition as two, and exp, a division or a root as one. Work that an offer adds of its
own (recomputing, padding, casts) counts as nothing, so that figures of different offers can be compared.

Letters in the formulas: s bytes of an element, T tokens, B sequences, H/K query/kv heads, D/E head dims (E of
v), C hidden size, F intermediate size, V vocabulary, X experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
TILE = 1 << 18
"""Numbers that are drawn; larger tensors repeat them, which no kernel notices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """See above. Everything is on the host until it is moved."""

    tensors: Callable[[int], dict[str, Tensor]]
    """Seed -> inputs by name."""
    prepare: Callable[[Sequence[Any], Tensors], Callable[[], Any]]
    """(implementations: those of partners or caches first, inputs on the device) -> the call to be timed."""
    bytes: float
    flops: float
    differentiable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is timed of an op, as data."""

    sizes: Sizes
    """Those of a host. Names that the plan weighs are called as in `Need.facts`."""
    quick: Sizes
    """Sizes that differ in a quick run."""
    large: Sizes
    """Sizes that differ on an accelerator, which a host's would not fill."""
    make: Callable[[Sizes, torch.dtype], Work]


def numbers(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal numbers; those of a large tensor repeat."""
    count = 1
    for size in shape:
        count *= size
    drawn = scale * torch.randn(min(count, TILE), generator=generator)
    return drawn.to(dtype).repeat(-(-count // max(len(drawn), 1)))[:count].view(shape)


def seeded(seed: int) -> torch.Generator:
    """A generator on the host."""
    return torch.Generator().manual_seed(seed)


def shared_out(tokens: int, sequences: int) -> list[int]:
    """Lengths of sequences that are as equal as can be."""
    base, rest = divmod(tokens, sequences)
    return [base + (i < rest) for i in range(sequences)]


def seen(before: int, new: int, window: int | None = None) -> float:
    """Pairs of a query and a key that it sees: `new` queries behind `before` other keys of their sequence."""
    if window is None:
        return new * before + new * (new + 1) / 2
    return float(sum(min(before + i + 1, window) for i in range(new)))
