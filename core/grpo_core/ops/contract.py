"""The table of op contracts: which hook offers an op, its signature, its reference, its version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """One named operation. Everything here is data, so that planning imports no torch."""

    op: str
    hook: str
    """Hook that offers it, without the `grpo_` prefix."""
    protocol: str
    """"module:Protocol": a `__call__` signature, or the Protocol of a class."""
    reference: str | None
    """"module:attribute" of the torch reference, which is the specification; None for a pure speed-up."""
    kind: str = "function"
    """"function": the bound object is called; "class": it is constructed."""
    version: int = 0
    oldest: int = 0
    """Oldest version of an offer that an adapter still serves."""
    covers: tuple[str, ...] = ()
    """Ops that this one replaces where it is chosen."""
    backward: bool = False
    """Whether the reference is differentiable."""
    added: Mapping[str, tuple[int, object]] = field(default_factory=lambda: MappingProxyType({}))
    """Keyword -> (version that added it, neutral value): older offers serve calls with the neutral value."""


def _table() -> dict[str, Contract]:
    attention, fused = "grpo_core.ops.attention", "grpo_core.ops.fused"
    ref_a, ref_f = "grpo_core.ops.reference.attention", "grpo_core.ops.reference.fused"
    rows = [
        Contract(
            op="attention.varlen",
            hook="attention",
            protocol=f"{attention}:Varlen",
            reference=f"{ref_a}:varlen",
            backward=True,
        ),
        Contract(
            op="attention.shared_prefix",
            hook="attention",
            protocol=f"{attention}:SharedPrefix",
            reference=f"{ref_a}:shared_prefix",
            backward=True,
        ),
        Contract(
            op="attention.cache",
            hook="attention",
            protocol=f"{attention}:KVCache",
            reference=f"{ref_a}:DenseCache",
            kind="class",
        ),
        Contract(
            op="attention.prefill",
            hook="attention",
            protocol=f"{attention}:Prefill",
            reference=f"{ref_a}:prefill",
        ),
        Contract(
            op="attention.decode",
            hook="attention",
            protocol=f"{attention}:Decode",
            reference=f"{ref_a}:decode",
        ),
        Contract(
            op="attention.step",
            hook="attention",
            protocol=f"{attention}:Step",
            reference=None,
            covers=("attention.decode",),
        ),
        Contract(
            op="norm.rms",
            hook="fused_ops",
            protocol=f"{fused}:RmsNorm",
            reference=f"{ref_f}:rms_norm",
            backward=True,
        ),
        Contract(
            op="rope.apply",
            hook="fused_ops",
            protocol=f"{fused}:RopeApply",
            reference=f"{ref_f}:rope_apply",
            backward=True,
        ),
        Contract(
            op="mlp.swiglu",
            hook="fused_ops",
            protocol=f"{fused}:SwiGLU",
            reference=f"{ref_f}:swiglu",
            backward=True,
        ),
        Contract(
            op="linear.packed",
            hook="fused_ops",
            protocol=f"{fused}:PackedLinear",
            reference=f"{ref_f}:PlainLinear",
            kind="class",
        ),
        Contract(
            op="sample.token",
            hook="fused_ops",
            protocol=f"{fused}:SampleToken",
            reference=f"{ref_f}:sample_token",
        ),
        Contract(
            op="loss.logprob",
            hook="fused_ops",
            protocol=f"{fused}:LogProb",
            reference=f"{ref_f}:logprob",
            backward=True,
        ),
        Contract(op="optim.adamw", hook="fused_ops", protocol=f"{fused}:AdamW", reference=f"{ref_f}:adamw"),
        Contract(
            op="memory.allocator",
            hook="memory",
            protocol="grpo_core.ops.memory:Memory",
            reference="grpo_core.ops.reference.memory:HostMemory",
            kind="class",
        ),
        Contract(
            op="comm.collectives",
            hook="collectives",
            protocol="grpo_core.ops.collectives:Collectives",
            reference="grpo_core.ops.reference.collectives:SingleProcess",
            kind="class",
        ),
        Contract(
            op="engine.rollout",
            hook="rollout_engines",
            protocol="grpo_core.rollout.base:Rollout",
            reference="grpo_core.rollout.engine:NativeRollout",
            kind="class",
        ),
        Contract(
            op="engine.train",
            hook="train_backends",
            protocol="grpo_core.train.base:Trainer",
            reference="grpo_core.train.trainer:NativeTrainer",
            kind="class",
        ),
    ]
    return {row.op: row for row in rows}


CONTRACTS: Mapping[str, Contract] = MappingProxyType(_table())
"""Every known op. An offer for an op that is not here is refused with that reason."""
