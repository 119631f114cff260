"""One call of an op with all that must be known to judge the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
Tensors = Mapping[str, Tensor]
APART = 1000
"""Between the seeds of one draw and those of the next: more than any case has."""
_DRAW = ContextVar("draw", default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Inputs, the call, and the oracle. Tensors are on the host, already in the dtypes of the call."""

    label: str
    tensors: Tensors
    call: Callable[[Any, Tensors], Any]
    """(implementation, tensors by name) -> what it returns; a tensor or a tuple, where None is left out."""
    oracle: Callable[[Tensors], Any]
    """The same in float64: floating tensors come widened, and what it returns is laid out alike."""
    dtype: torch.dtype
    """Whose rounding the results are granted."""
    names: tuple[str, ...] = ("result",)
    """Of the results, then of the tensors in `written`."""
    differentiable: tuple[str, ...] = ()
    """Inputs that gradients are asked for, where the offer has a backward pass."""
    written: tuple[str, ...] = ()
    """Inputs that the op updates in place; they count as results behind those that are returned."""
    spent: tuple[str, ...] = ()
    """Inputs whose content nobody needs afterwards."""
    reference: Any = None
    """Computes the same from the references of core, where the contract has none of its own."""
    own_rounding: bool = False
    """Each result is granted the rounding of its own dtype, which is narrower than `dtype` for float32
    results of bfloat16 ops that the contract says are computed in float32."""
    magnitudes: Mapping[str, float] = field(default_factory=dict)
    """By result: the size of what it is the difference of."""
    poison: Mapping[str, Any] = field(default_factory=dict)
    """By input: an index whose elements are NaN in the call, and not for the oracle."""
    judged: Mapping[str, Any] | None = None
    """By result or "gradient of <input>": an index of what is compared; others are not. None for all."""
    padded: tuple[str, ...] = ()
    """Inputs that are given as rows with a gap between them, as slices of a fused projection are."""
    seed: int = 0

    def sizes(self) -> dict[str, list[int]]:
        """Shapes of all inputs."""
        return {name: list(x.shape) for name, x in self.tensors.items()}


def laid_out(returned: Any) -> list[Tensor]:
    """What was returned as a list, without the Nones."""
    parts = returned if isinstance(returned, tuple | list) else (returned,)
    return [part for part in parts if part is not None]


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Normal numbers, drawn in float64 and rounded once."""
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@contextmanager
def drawn(number: int) -> Iterator[None]:
    """Other values for all that is made meanwhile: 0 is what a run of the suite asks."""
    token = _DRAW.set(number)
    try:
        yield
    finally:
        _DRAW.reset(token)


def of_draw(seed: int) -> int:
    """A case's seed in the present draw."""
    return seed + APART * _DRAW.get()


def seeded(seed: int) -> torch.Generator:
    """A generator on the host."""
    return torch.Generator().manual_seed(of_draw(seed))


HOSTED = "lengths on the host"
"""Name of the shapes whose calls are given `common`, from version 1 of the contracts on."""


def hint(
    shape: str, lengths: Sequence[int], parents: Sequence[int] | None = None, **more: int
) -> dict[str, Common]:
    """`common` as a keyword for calls of the shape `HOSTED`, nothing for others; made anew for each call."""
    if shape != HOSTED:
        return {}
    known = None if parents is None else list(parents)
    return {"common": Common(cu_seqlens=cumulative(lengths).tolist(), parents=known, **more)}


def cumulative(lengths: Sequence[int]) -> Tensor:
    """int32 [S + 1]."""
    return torch.tensor(
        [0, *torch.tensor(list(lengths), dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32
    )
