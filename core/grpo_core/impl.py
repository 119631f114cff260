"""Offers and needs: the data that hooks answer with and that the plan weighs."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

NOTHING: Mapping[str, Container[object]] = MappingProxyType({})
PROOFS = ("", "audited", "simulated", "hardware")
"""Levels of proof, each with those before it: calls held against the vendor's signatures; the conformance
suite passed on the vendor's package over a simulated chip; the suite passed on the chip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What one device is and can do, as found by its probe; no vendor package was imported for it."""

    type: str
    """Torch device type: "cpu", "cuda", "npu", ..."""
    vendor: str = ""
    """Maker of the chip; "" where that says nothing."""
    name: str = ""
    """Product name as a person would say it."""
    count: int = 1
    """Devices of this type that the process may use."""
    memory_bytes: int = 0
    """Of one device; 0 when not known without the vendor's package."""
    dtypes: frozenset[str] = frozenset({"float32"})
    """Short dtype names that the device computes in: "bfloat16", "float16", "float32", "float64"."""
    features: frozenset[str] = frozenset()
    """Named capabilities: "avx512_bf16", "amx_bf16", "compiler", ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What this model and this config ask of one op."""

    op: str
    """A known contract."""
    facts: Mapping[str, object] = field(default_factory=lambda: NOTHING)
    """Values held against `Impl.limits`: {"dtype": "bfloat16", "head_dim": 64, ...}."""
    backward: bool = False
    """Whether gradients must flow through it."""
    graph: bool = False
    """Whether it must be capturable in a device graph."""
    deterministic: bool = False
    """Whether equal inputs must give equal bits."""
    batch_invariant: bool = False
    """Whether the bits of a sequence may depend on that sequence alone (see `Impl.batch_invariant`)."""
    required: bool = True
    """False for an op that only makes things faster (`attention.step`): unserved is not an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Impl:
    """An offer to serve one op on one device type: data, with a lazy pointer to the code."""

    op: str
    """A known contract, e.g. "attention.varlen"."""
    name: str
    """Unique within its plugin; the full id is "<plugin>:<name>"."""
    device: str
    """Torch device type, or "*" for pure torch code."""
    load: str
    """"package.module:attribute", imported at bind only."""
    requires: tuple[str, ...] = ()
    """PEP 508 requirements, checked against installed metadata."""
    symbols: tuple[str, ...] = ()
    """Vendor symbols that the code calls, for the static audit."""
    limits: Mapping[str, Container[object]] = field(default_factory=lambda: NOTHING)
    """Allowed values by fact: {"dtype": {"bfloat16"}, "head_dim": range(8, 257, 8)}."""
    when: Callable[[DeviceInfo, Need], str | None] | None = None
    """Last word: a reason to refuse, or None."""
    backward: bool = False
    """Differentiable."""
    graph: bool = False
    """Can be captured in a device graph: a replay computes the same on what the tensors hold then. The host
    waits for nothing; of `common` it reads `max_seqlen_k` and `once`, lists only where the device's graph
    renews them. A class keeps its memory in its place, also when it takes new weights."""
    deterministic: bool = False
    """Equal inputs give equal bits."""
    batch_invariant: bool = False
    """A row's bits depend on that row alone (with attention or a state: on its sequence), not on what is
    packed, batched or padded around it, nor on how its sequence is cut into calls. Offers of one plugin that
    belong together give the same bits for the same sequence: attention.*, mla.*, gated_delta.*, short_conv.*,
    linear.dense and linear.packed, loss.logprob and sample.token."""
    rank: int = 50
    """0 reference, 50 ok, 80 fused vendor kernel."""
    contract: int = 0
    """Contract version that it was written for."""
    proof: str = ""
    """One of `PROOFS`: how far it was checked where its device is absent; "" where nothing is claimed."""
