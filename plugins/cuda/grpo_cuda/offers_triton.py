"""Offers of our own Triton kernels and of the optimizer on CUDA, as data; imports no torch or triton.

The kernels ran in Triton's interpreter on a CPU, where the conformance suite's questions were put to them,
and are compiled for the capabilities below: their proof is "simulated", no GPU has run them.
"""

from __future__ import annotations

from collections.abc import Iterator

from grpo_core.impl import Impl

from .offer import AMPERE, COMPILED, FLOATS, TRITON, Limits, at_least, offer
from .triton_blocks import WIDEST

REQUIRES = ("triton>=3.6",)
"""What torch 2.10 and later bring along for Linux; the extra `cuda` asks for the same. The kernels were
compiled and interpreted with 3.6.0, 3.7.1 and 3.9.0. Their calls fit older signatures too, which says little
of what the compiler makes of them."""
NAME = "triton"
_ANY: Limits = {"dtype": FLOATS}
_ROWS: Limits = {"dtype": FLOATS, "hidden_size": range(8, WIDEST + 1)}
_HEADS: Limits = {"dtype": FLOATS, "head_dim": range(2, 1025), "rotary_dim": range(2, 1025, 2)}
_WIDE: Limits = {"dtype": frozenset({"float32"})}


def _offers() -> Iterator[Impl]:
    yield _kernel("norm.rms", "triton_norm:rms_norm", _ROWS, graph=True, batch_invariant=True)
    yield _kernel("rope.apply", "triton_rope:rope_apply", _HEADS, graph=True, batch_invariant=True)
    yield _kernel("mlp.swiglu", "triton_swiglu:swiglu", _ANY, graph=True, batch_invariant=True)
    yield _kernel("linear.dense", "triton_linear:linear_dense", _ANY)
    yield _kernel("loss.logprob", "triton_logprob:logprob", _ANY)
    yield _kernel("sample.token", "triton_sample:sample_token", _ANY)
    yield _kernel("optim.adamw", "triton_adamw:adamw", _WIDE)
    yield offer("optim.adamw", "fused", "adamw:adamw", rank=COMPILED, limits=_WIDE)


def _kernel(
    op: str, load: str, limits: Limits, *, graph: bool = False, batch_invariant: bool = False
) -> Impl:
    return offer(
        op, NAME, load, rank=TRITON, limits=limits, requires=REQUIRES, when=at_least(AMPERE), graph=graph,
        batch_invariant=batch_invariant, proof="simulated",
    )  # fmt: skip


OFFERS: tuple[Impl, ...] = tuple(_offers())
