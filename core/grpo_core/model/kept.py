"""Tensors of a checkpoint that the decoder does not compute with, on their way from source to export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint_io import read_tensors

if TYPE_CHECKING:
    from .weights import WeightMap


def read_kept(source: Path, weight_map: WeightMap) -> Iterator[tuple[str, Tensor]]:
    """Kept tensors that a model folder has (it may have none), bit for bit; float8 ones in bfloat16.

    Raises `CheckpointError` as `read_tensors` does.
    """
    if weight_map.kept:
        yield from read_tensors(source, wanted=weight_map.kept.__contains__, fp8_to=torch.bfloat16)


def with_kept(
    exported: Iterator[tuple[str, Tensor]],
    kept: Iterator[tuple[str, Tensor]],
    weight_map: WeightMap,
    neutral: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """An export followed by kept tensors; copies of the embedding or head take their trained values."""
    yield from exported
    places = weight_map.places() if weight_map.kept_copies else {}
    for name, tensor in kept:
        source = weight_map.kept_copies.get(name)
        rule, part = places.get(source or "", (None, None))
        if rule is None or part is None:
            yield name, tensor
        else:
            yield name, rule.take(part, neutral[rule.neutral].detach()).to(tensor.dtype)
