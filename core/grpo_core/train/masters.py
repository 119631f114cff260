"""A float32 master weight in 32 bits, of which the upper 16 are the bfloat16 weight to compute with.

With `m` the bits of a float32 as an integer, the bfloat16 weight is `(m + 0x8000) >> 16` (nearest, ties away
from zero) and the remainder the signed lower half of `m`, so that `m = (weight << 16) + remainder` exactly.
The pair takes 4 bytes a parameter where a float32 master beside a bfloat16 copy takes 6 (the layout of
`store_param_remainders` in NVIDIA Apex's distributed Adam).
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = 0x8000


def join(weights_P: Tensor, remainders_P: Tensor, masters_P: Tensor) -> None:
    """Write the float32 masters of bfloat16 weights and int16 remainders; all [P], contiguous."""
    masters_P.copy_(weights_P)
    masters_P.view(torch.int32).add_(remainders_P)


def split(masters_P: Tensor, weights_P: Tensor, remainders_P: Tensor) -> None:
    """The inverse of `join`, exact to the bit for every finite master. Destroys `masters_P`."""
    bits_P = masters_P.view(torch.int32)
    remainders_P.copy_(bits_P)
    weights_P.view(torch.int16).copy_(bits_P.add_(HALF).bitwise_right_shift_(16))
