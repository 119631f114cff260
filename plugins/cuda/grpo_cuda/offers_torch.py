"""What plain torch serves on CUDA: the core's own functions, for ops whose fused kernels are not here.

They compute in float32 (float64 for float64) and keep no more than they must; nothing is installed for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS

from .offer import ALL_FLOATS, TORCH, offer

_PLAIN = ("norm.rms", "rope.apply", "mlp.swiglu", "linear.dense", "linear.packed", "sample.token",
          "loss.logprob")  # fmt: skip

_WAITS = ("sample.token", "loss.logprob")
"""They ask the device whether their arguments make sense."""


def _offers() -> Iterator[Impl]:
    for op in _PLAIN:
        yield offer(op, "torch", CONTRACTS[op].reference or "", rank=TORCH, limits={"dtype": ALL_FLOATS},
                    graph=op not in _WAITS)  # fmt: skip
    limits = {"dtype": frozenset({"float32"})}
    yield offer("optim.adamw", "torch", CONTRACTS["optim.adamw"].reference or "", rank=TORCH, limits=limits)


OFFERS: tuple[Impl, ...] = tuple(_offers())
