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
    version: int = 1
    oldest: int = 0
    """Oldest version of an offer that is still served."""
    covers: tuple[str, ...] = ()
    """Ops that this one replaces where it is chosen."""
    backward: bool = False
    """Whether the reference is differentiable."""
    added: Mapping[str, tuple[int, object]] = field(default_factory=lambda: MappingProxyType({}))
    """Keyword -> (version that added it, neutral value): older offers serve calls with the neutral value."""
    hints: tuple[str, ...] = ()
    """Added keywords that only save work: an older offer serves every call, as if they had not been given."""


_ATTENTION, _FUSED = "grpo_core.ops.attention", "grpo_core.ops.fused"
_REF_A, _REF_F = "grpo_core.ops.reference.attention", "grpo_core.ops.reference.fused"
_MLA, _REF_MLA = "grpo_core.ops.mla", "grpo_core.ops.reference.mla"
_LINEAR, _REF_LINEAR = "grpo_core.ops.linear_attention", "grpo_core.ops.reference.linear_attention"
_MOE, _REF_MOE = "grpo_core.ops.moe", "grpo_core.ops.reference.moe"
_COMMON: Mapping[str, tuple[int, object]] = {"common": (1, None)}
_ROWS = (
    Contract(
        op="attention.varlen",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_ATTENTION}:Varlen",
        reference=f"{_REF_A}:varlen",
        backward=True,
    ),
    Contract(
        op="attention.shared_prefix",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_ATTENTION}:SharedPrefix",
        reference=f"{_REF_A}:shared_prefix",
        backward=True,
    ),
    Contract(
        op="attention.cache",
        hook="attention",
        protocol=f"{_ATTENTION}:KVCache",
        reference=f"{_REF_A}:DenseCache",
        kind="class",
    ),
    Contract(
        op="attention.prefill",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_ATTENTION}:Prefill",
        reference=f"{_REF_A}:prefill",
    ),
    Contract(
        op="attention.decode",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_ATTENTION}:Decode",
        reference=f"{_REF_A}:decode",
    ),
    Contract(
        op="attention.step",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_ATTENTION}:Step",
        reference=None,
        covers=("attention.decode",),
    ),
    Contract(
        op="mla.varlen",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_MLA}:MlaVarlen",
        reference=f"{_REF_MLA}:varlen",
        backward=True,
    ),
    Contract(
        op="mla.cache",
        hook="attention",
        protocol=f"{_MLA}:LatentCache",
        reference=f"{_REF_MLA}:DenseLatentCache",
        kind="class",
    ),
    Contract(
        op="mla.prefill",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_MLA}:MlaPrefill",
        reference=f"{_REF_MLA}:prefill",
    ),
    Contract(
        op="mla.decode",
        added=_COMMON,
        hints=("common",),
        hook="attention",
        protocol=f"{_MLA}:MlaDecode",
        reference=f"{_REF_MLA}:decode",
    ),
    Contract(
        op="gated_delta.chunk",
        added=_COMMON,
        hints=("common",),
        hook="linear_attention",
        protocol=f"{_LINEAR}:DeltaChunk",
        reference=f"{_REF_LINEAR}:delta_chunk",
        backward=True,
    ),
    Contract(
        op="gated_delta.step",
        hook="linear_attention",
        protocol=f"{_LINEAR}:DeltaStep",
        reference=f"{_REF_LINEAR}:delta_step",
    ),
    Contract(
        op="short_conv.varlen",
        added=_COMMON,
        hints=("common",),
        hook="linear_attention",
        protocol=f"{_LINEAR}:ConvVarlen",
        reference=f"{_REF_LINEAR}:conv_varlen",
        backward=True,
    ),
    Contract(
        op="short_conv.step",
        hook="linear_attention",
        protocol=f"{_LINEAR}:ConvStep",
        reference=f"{_REF_LINEAR}:conv_step",
    ),
    Contract(
        op="moe.route",
        hook="fused_moe",
        protocol=f"{_MOE}:MoeRoute",
        reference=f"{_REF_MOE}:route",
        backward=True,
    ),
    Contract(
        op="moe.dispatch",
        hook="fused_moe",
        protocol=f"{_MOE}:MoeDispatch",
        reference=f"{_REF_MOE}:dispatch",
        backward=True,
    ),
    Contract(
        op="moe.experts",
        added={"main_grad_gate_up_XGC": (1, None), "main_grad_down_XCF": (1, None)},
        hints=("main_grad_gate_up_XGC", "main_grad_down_XCF"),
        hook="fused_moe",
        protocol=f"{_MOE}:MoeExperts",
        reference=f"{_REF_MOE}:experts",
        backward=True,
    ),
    Contract(
        op="moe.combine",
        hook="fused_moe",
        protocol=f"{_MOE}:MoeCombine",
        reference=f"{_REF_MOE}:combine",
        backward=True,
    ),
    Contract(
        op="moe.layer",
        hook="fused_moe",
        protocol=f"{_MOE}:MoeLayer",
        reference=None,
        covers=("moe.route", "moe.dispatch", "moe.experts", "moe.combine"),
    ),
    Contract(
        op="norm.rms",
        hook="fused_ops",
        protocol=f"{_FUSED}:RmsNorm",
        reference=f"{_REF_F}:rms_norm",
        backward=True,
    ),
    Contract(
        op="rope.apply",
        added=_COMMON,
        hints=("common",),
        hook="fused_ops",
        protocol=f"{_FUSED}:RopeApply",
        reference=f"{_REF_F}:rope_apply",
        backward=True,
    ),
    Contract(
        op="mlp.swiglu",
        hook="fused_ops",
        protocol=f"{_FUSED}:SwiGLU",
        reference=f"{_REF_F}:swiglu",
        backward=True,
    ),
    Contract(
        op="linear.dense",
        hook="fused_ops",
        protocol=f"{_FUSED}:DenseLinear",
        reference=f"{_REF_F}:linear_dense",
        backward=True,
    ),
    Contract(
        op="linear.packed",
        hook="fused_ops",
        protocol=f"{_FUSED}:PackedLinear",
        reference=f"{_REF_F}:PlainLinear",
        kind="class",
    ),
    Contract(
        op="sample.token",
        hook="fused_ops",
        protocol=f"{_FUSED}:SampleToken",
        reference=f"{_REF_F}:sample_token",
    ),
    Contract(
        op="loss.logprob",
        added={"main_grad_VC": (1, None)},
        hints=("main_grad_VC",),
        hook="fused_ops",
        protocol=f"{_FUSED}:LogProb",
        reference=f"{_REF_F}:logprob",
        backward=True,
    ),
    Contract(op="optim.adamw", hook="fused_ops", protocol=f"{_FUSED}:AdamW", reference=f"{_REF_F}:adamw"),
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
)

CONTRACTS: Mapping[str, Contract] = MappingProxyType({row.op: row for row in _ROWS})
"""Every known op. An offer for an op that is not here is refused with that reason."""
