"""torch's settings for equal bits around single kernels, where they say more or less than is meant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def any_order() -> Iterator[None]:
    """For writes to rows that are all different: torch's deterministic form of them sorts first, for the same
    bits."""
    asked = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if asked:
        torch._C._set_deterministic_algorithms(False)
    try:
        yield
    finally:
        if asked:
            torch._C._set_deterministic_algorithms(True, warn_only=warn)


def repeatable(out: Tensor) -> Tensor:
    """`out` as it is, whose backward kernel repeats its bits where torch is asked for them.

    torch's fused attention has such a kernel, but takes the other one, with a warning, where warnings are all
    that is asked for; so while it starts, torch is told that errors are wanted. `out` must be what the
    attention returned, or the part of it without padded dimensions.
    """
    asked = torch.are_deterministic_algorithms_enabled()
    node = out.grad_fn
    while node is not None and node.name().startswith("Slice"):
        node = node.next_functions[0][0]
    if asked and torch.is_deterministic_algorithms_warn_only_enabled() and node is not None:
        node.register_prehook(_insist)
        node.register_hook(_warn)
    return out


def _insist(grads: tuple[Tensor, ...]) -> None:
    torch._C._set_deterministic_algorithms(True, warn_only=False)


def _warn(grad_inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...]) -> None:
    torch._C._set_deterministic_algorithms(True, warn_only=True)
