"""The bound ops: one frozen dataclass of callables for each namespace of the contracts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops import attention as a
    from .ops import collectives as c
    from .ops import fused as f
    from .ops import linear_attention as la
    from .ops import memory as m
    from .ops import mla, moe
    from .rollout.base import Rollout
    from .train.base import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOps:
    varlen: a.Varlen
    shared_prefix: a.SharedPrefix
    cache: type[a.KVCache]
    prefill: a.Prefill
    decode: a.Decode
    step: a.Step | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaOps:
    varlen: mla.MlaVarlen
    cache: type[mla.LatentCache]
    prefill: mla.MlaPrefill
    decode: mla.MlaDecode


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaOps:
    chunk: la.DeltaChunk
    step: la.DeltaStep


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConvOps:
    varlen: la.ConvVarlen
    step: la.ConvStep


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeOps:
    route: moe.MoeRoute
    dispatch: moe.MoeDispatch
    experts: moe.MoeExperts
    combine: moe.MoeCombine
    layer: moe.MoeLayer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NormOps:
    rms: f.RmsNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeOps:
    apply: f.RopeApply


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpOps:
    swiglu: f.SwiGLU


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearOps:
    dense: f.DenseLinear
    packed: type[f.PackedLinear]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOps:
    token: f.SampleToken


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOps:
    logprob: f.LogProb


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimOps:
    adamw: f.AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOps:
    allocator: type[m.Memory]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommOps:
    collectives: type[c.Collectives]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOps:
    rollout: type[Rollout]
    train: type[Trainer]
