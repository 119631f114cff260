"""The weights of a fresh model, as transformers initialises them."""

from __future__ import annotations

import torch
from torch import nn

from .gated_delta import GatedDeltaMixer
from .layers import Norm

A_RANGE = (0.01, 16.0)
"""Of exp(A_log); away from 0, whose logarithm is infinite."""


def initialise(module: nn.Module, seed: int, std: float) -> None:
    """Fill every parameter: matrices normal with `std`, norms 1 (0 where they are zero-centred), biases 0.

    In a gated delta net dt_bias is 1 and exp(A_log) uniform. The draw depends on the seed and on names and
    shapes only, not on device or dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if isinstance(owner, Norm):
                    parameter.fill_(0.0 if owner.zero_centered else 1.0)
                elif isinstance(owner, GatedDeltaMixer) and name == "A_log":
                    drawn = torch.empty(parameter.shape).uniform_(*A_RANGE, generator=generator)
                    parameter.copy_(drawn.log())
                elif name == "dt_bias":
                    parameter.fill_(1.0)
                elif name == "bias":
                    parameter.zero_()
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
