"""Checkpoints in float8 e4m3 with one scale for each 128 x 128 block (DeepSeek-V3, arXiv 2412.19437, 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

BLOCK = 128
SCALE = "_scale_inv"
"""Ending of the name of a weight's scales, which multiply in spite of it."""
DTYPES = ("F8_E4M3", "F8_E5M2")
"""Names of float8 in safetensors."""
SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the header of a safetensors file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """"BF16", "F8_E4M3", ..."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One scale for each block, those at the edges being smaller."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_scales(folder: Path, entries: Mapping[str, Entry]) -> frozenset[str]:
    """Names of all scales. Raises `CheckpointError` that lists float8 weights whose scales do not fit."""
    scales, troubles = set(), []
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            continue
        scale = entries.get(name + SCALE)
        scales.add(name + SCALE)
        wanted = scale_shape(entry.shape)
        if entry.dtype != "F8_E4M3" or len(entry.shape) != 2:
            troubles.append(f"{name} is {entry.dtype} {list(entry.shape)}, not a matrix of F8_E4M3")
        elif scale is None:
            troubles.append(f"{name + SCALE} is missing")
        elif scale.shape != wanted:
            troubles.append(f"{name + SCALE} {list(scale.shape)} instead of {list(wanted)}")
        elif scale.dtype not in ("F32", "BF16"):
            troubles.append(f"{name + SCALE} is {scale.dtype}, not F32")
    alone = [name for name in entries if name.endswith(SCALE) and name not in scales]
    troubles += [f"{name} scales nothing: {name.removesuffix(SCALE)} is not in float8" for name in alone]
    if troubles:
        rest = len(troubles) - SHOWN
        raise CheckpointError(
            f"the float8 weights of {folder} cannot be read: {len(troubles)} troubles",
            why="; ".join(troubles[:SHOWN]) + (f" and {rest} more" if rest > 0 else ""),
            fix="download the model again, or use its checkpoint in bfloat16",
        )
    return frozenset(scales)


def dequantise(weight_MN: Tensor, scale_IJ: Tensor, dtype: torch.dtype) -> Tensor:
    """weight[m, n] * scale[m // 128, n // 128], computed in float32 and rounded once to `dtype`.

    weight is float8_e4m3fn [M, N], scale float32 [ceil(M / 128), ceil(N / 128)]. Besides the result no more
    than 128 rows are held.
    """
    rows, columns = weight_MN.shape
    out_MN = torch.empty(rows, columns, dtype=dtype)
    for block, start in enumerate(range(0, rows, BLOCK)):
        scale_N = scale_IJ[block].float().repeat_interleave(BLOCK)[:columns]
        part = weight_MN[start : start + BLOCK].float()
        out_MN[start : start + BLOCK] = part.mul_(scale_N)
    return out_MN
