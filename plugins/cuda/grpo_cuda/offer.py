"""How the tables of this plugin write an offer: ranks, limits that several share, reasons to refuse."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from grpo_core.impl import NOTHING, DeviceInfo, Impl, Need
from grpo_core.ops.contract import CONTRACTS

Limits = Mapping[str, Container[object]]
When = Callable[[DeviceInfo, Need], str | None]

VENDOR, TRITON, COMPILED, TORCH = 80, 70, 60, 40
"""Ranks: a vendor's or library's fused kernel, our Triton kernels, torch's own fused kernels, plain torch.
Within a rank's ten the better of two is one higher."""

HALVES = frozenset({"bfloat16", "float16"})
FLOATS = HALVES | {"float32"}
ALL_FLOATS = FLOATS | {"float64"}
CONTRACT = 1
"""Version of the contracts that the plugin's own functions are written for, where an offer does not say."""
CACHE_ID = "cuda:paged"
"""The key/value cache, in pages, that every attention over a cache here reads."""
SMALL_PAGES_ID = "cuda:small_pages"
"""The same in pages of 16, for readers that take pages of any size."""
LATENT_ID = "cuda:paged"
"""The latent cache of MLA: an id is unique for one op."""

FLASH_ATTN = ("flash-attn>=2.6,<3",)
"""From 2.6 on its functions read pages with packed queries."""
TRANSFORMER_ENGINE = ("transformer-engine>=2.2,<3",)

AMPERE, HOPPER, BLACKWELL = 80, 90, 100
"""Compute capabilities, major times ten plus minor."""


def capability(info: DeviceInfo) -> int | None:
    """Compute capability of the device (80, 90, 120), None where the probe could not tell: on paper."""
    known = [int(one[3:]) for one in info.features if one.startswith("sm_") and one[3:].isdigit()]
    return min(known, default=None)


def at_least(wanted: int, why: str = "the kernel") -> When:
    """Refuses devices of a lower compute capability."""

    def when(info: DeviceInfo, need: Need) -> str | None:
        have = capability(info)
        if have is None or have >= wanted:
            return None
        return f"{why} needs compute capability {_dotted(wanted)}, {info.name} has {_dotted(have)}"

    return when


def exactly(wanted: frozenset[int], why: str = "the kernel") -> When:
    """Refuses devices of other compute capabilities."""

    def when(info: DeviceInfo, need: Need) -> str | None:
        have = capability(info)
        if have is None or have in wanted:
            return None
        listed = " or ".join(_dotted(one) for one in sorted(wanted))
        return f"{why} is built for compute capability {listed}, {info.name} has {_dotted(have)}"

    return when


def every(*conditions: When) -> When:
    """The first reason that any of the conditions gives."""

    def when(info: DeviceInfo, need: Need) -> str | None:
        return next((reason for one in conditions if (reason := one(info, need))), None)

    return when


def same_head_dim(info: DeviceInfo, need: Need) -> str | None:
    """Refuses keys and values of different sizes."""
    key, value = (need.facts.get(name) for name in ("head_dim", "v_head_dim"))
    return None if key == value else f"values of {value} beside keys of {key}: the kernel wants one size"


def _dotted(value: int) -> str:
    return f"{value // 10}.{value % 10}"


def offer(
    op: str, name: str, load: str, *, rank: int, limits: Limits = NOTHING, requires: tuple[str, ...] = (),
    symbols: tuple[str, ...] = (), when: When | None = None, graph: bool = False, deterministic: bool = True,
    batch_invariant: bool = False, contract: int | None = None, proof: str = "audited",
) -> Impl:  # fmt: skip
    """An offer for CUDA devices. `load` is "module:attribute" of this plugin, or starts with "grpo_core.".

    `contract` is what the function was written for: where it is left out, the newest version for the core's
    own functions, and CONTRACT for those of this plugin. It has a backward pass where the reference has one.
    `proof` is of this plugin's code, all of whose calls the audit reads; the core's own functions claim none.
    """
    own = not load.startswith("grpo_core.")
    if contract is None:
        contract = CONTRACT if own else CONTRACTS[op].version
    return Impl(
        op=op,
        name=name,
        device="cuda",
        load=f"grpo_cuda.{load}" if own else load,
        requires=requires,
        symbols=symbols,
        limits=limits,
        when=when,
        backward=CONTRACTS[op].backward,
        graph=graph,
        deterministic=deterministic,
        batch_invariant=batch_invariant,
        rank=rank,
        contract=contract,
        proof=proof if own else "",
    )
