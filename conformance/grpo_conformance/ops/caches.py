"""Cases of the token caches and of the ops that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.backend import import_pointer
from grpo_core.catalogue import Offer
from grpo_core.ops.contract import CONTRACTS
from grpo_core.ops.reference import attention as reference_attention
from grpo_core.ops.reference import fused as reference_fused
from grpo_core.plugin_checks import CACHE_OF, CACHES

from ..case import Outcome, Target, failed, passed
from . import cache_life as script
from .attention import AXES as HEAD_AXES
from .attention import ENDS as HEAD_ENDS
from .buffers import bits
from .cache_kits import Heads, Kit, Latents
from .cache_life import Broken, Life
from .examine import Answer, judge
from .facts import Facts, refused
from .family import Family
from .mla import ENDS as LATENT_ENDS
from .mla import SIZES as LATENT_AXES
from .mla import weights
from .question import DTYPES, Question

SLOTS, TOKENS = 16, 1200
READER: Mapping[str, Facts] = {
    "generation": {}, "slots used again": {}, "isolation": {}, "length 1": {}, "long sequences": {},
}  # fmt: skip
CACHE: Mapping[str, Facts] = {**READER, "room": {}, "release": {}}
STEP: Mapping[str, Facts] = {
    "steps": {}, "first steps": {}, "windows": {"window": True}, "interleaved": {"interleaved": True},
    "norms of heads": {"qk_norm": True}, "part of the head": {"rotary_dim": 16},
}  # fmt: skip
QUICK = ("generation", "isolation", "room", "steps", "norms of heads")
SCRIPTS: Mapping[str, Callable[[Life], None]] = {
    "slots used again": script.slots_again,
    "isolation": script.isolation,
    "length 1": script.length_one,
    "long sequences": script.long_sequences,
    "release": script.released,
    "room": script.room,
    "first steps": script.first_steps,
}


def check(target: Target, offer: Offer, *, dtype: str, shape: str, facts: Facts) -> Outcome:
    """One life of a cache with its readers, beside the references' on the host and beside float64."""
    op = offer.impl.op
    cache_op = CACHE_OF.get(op, op)
    caches = _caches(target, offer, cache_op, facts)
    if not caches:
        return failed(f"no offer of {cache_op} is among those that it says it reads: {facts.get('cache')}")
    device, worst = target.device.open(0), passed()
    for cache in caches:
        readers = _readers(target, offer, cache, facts)
        kinds = {import_pointer(reader.impl.load): name for name, reader in readers.items()}
        outcome = live(
            import_pointer(cache.impl.load),
            {name: function for function, name in kinds.items()},
            kit_of(cache_op, facts, DTYPES[dtype]),
            shape,
            device,
            repeated=all(one.impl.deterministic for one in (cache, offer, *readers.values())),
        )
        if outcome.status != "pass":
            return outcome
        worst = outcome if (outcome.error or 0.0) >= (worst.error or 0.0) else worst
    return worst


def kit_of(cache_op: str, facts: Facts, dtype: torch.dtype) -> Kit:
    """The kind of tokens that a cache holds."""
    if cache_op == "attention.cache":
        return Heads(facts=facts, dtype=dtype)
    return Latents(facts=facts, dtype=dtype, weight_HUL=weights(facts, dtype))


def live(
    cache: Any, readers: Mapping[str, Callable[..., Tensor]], kit: Kit, shape: str, device: torch.device, *,
    repeated: bool,
) -> Outcome:  # fmt: skip
    """Run a script on a cache and judge what its readers gave. Without readers only promises are judged."""
    question = Question(
        label=shape, tensors={}, call=_nothing, oracle=_nothing, dtype=kit.dtype, seed=71
    )  # fmt: skip
    try:
        ours = _run(cache, readers, kit, shape, device)
        again = _run(cache, readers, kit, shape, device) if repeated else ours
    except Broken as broken:
        return failed(f"{shape}: {broken}", worst={"shape": shape, "facts": dict(kit.facts)})
    theirs = _run(*_references(kit, readers), kit, shape, torch.device("cpu"))
    outcome = judge(question, Answer(values=ours.got), ours.wanted, theirs.got, "in its life")
    if outcome.status == "pass":
        for name, x in ours.got.items():
            if not torch.equal(bits(x), bits(again.got[name])):
                return failed(f"{shape}: {name} has other bits in a second life, and all is deterministic")
    return outcome


def _run(cache: Any, readers: Mapping[str, Any], kit: Kit, shape: str, device: torch.device) -> Life:
    life = Life(kit, cache(kit.spec(device, SLOTS, TOKENS)), readers, device)
    windows: Sequence[int | None] = (None, 1, 4) if kit.facts.get("window") else (None,)
    if shape in SCRIPTS:
        SCRIPTS[shape](life)
    elif "step" in readers:
        script.steps(life, windows)
    else:
        script.generation(life, windows)
    return life


def _references(kit: Kit, readers: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    family = "attention" if isinstance(kit, Heads) else "mla"
    made: dict[str, Any] = {}
    for name in readers:
        reference = CONTRACTS[f"{family}.{name}"].reference
        made[name] = step if reference is None else import_pointer(reference)
    return import_pointer(str(CONTRACTS[f"{family}.cache"].reference)), made


def step(
    qkv_BW: Tensor, cache: Any, *, cos_BR: Tensor, sin_BR: Tensor, positions: Tensor, slots: Tensor,
    num_heads: int, scale: float, window: int | None, interleaved: bool, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """`attention.step` from core's references: norms, rotary, write, decode."""
    K, E = cache.v_RKE.shape[1:]
    D = cache.k_RKD.shape[2]
    q, k, v = torch.split(qkv_BW, [num_heads * D, K * D, K * E], 1)
    q, k, v = (torch.unflatten(x, 1, sizes) for x, sizes in ((q, (num_heads, D)), (k, (K, D)), (v, (K, E))))
    if q_norm is not None:
        q = reference_fused.rms_norm(q, q_norm, eps=eps, residual=None, zero_centered=False)
    if k_norm is not None:
        k = reference_fused.rms_norm(k, k_norm, eps=eps, residual=None, zero_centered=False)
    q, k = reference_fused.rope_apply(q, k, cos_BR, sin_BR, interleaved=interleaved)
    cache.write(k, v, slots_T=slots, positions_T=positions)
    o_BHE = reference_attention.decode(
        q, cache, seqlens_k=positions + 1, slots=slots, scale=scale, window=window
    )
    return o_BHE.flatten(1)


def _nothing(*given: Any) -> None:
    """There is no single call."""


def _caches(target: Target, offer: Offer, cache_op: str, facts: Facts) -> list[Offer]:
    """The caches to read: the offer itself, or those that it names and that take these sizes."""
    if offer.impl.op == cache_op:
        return [offer]
    named = {str(name) for name in offer.impl.limits["cache"]}  # type: ignore[attr-defined]
    return [one for one in target.offers[cache_op] if one.id in named and one.id == facts["cache"]]


def _readers(target: Target, offer: Offer, cache: Offer, facts: Facts) -> dict[str, Offer]:
    """Prefill, decode or step by name: the offer itself, or for a cache the best that read it."""
    if offer.impl.op in CACHE_OF:
        return {offer.impl.op.partition(".")[2]: offer}
    found: dict[str, Offer] = {}
    for op in CACHES[offer.impl.op]:
        name = op.partition(".")[2]
        if name == "step":
            continue
        asked = {**facts, "cache": cache.id}
        able = [one for one in target.offers.get(op, ()) if refused(one, target.probe.info, asked) is None]
        if able:
            found[name] = max(able, key=lambda one: one.impl.rank)
    return found


STEP_AXES = {
    **HEAD_AXES,
    "qk_norm": (False, True),
    "interleaved": (False, True),
    "rotary_dim": (32, 16, 64, 128),
}
WINDOWS: Mapping[str, Facts] = {"windows": {"window": True}, "wider values": {"v_head_dim": 64}}
_CHECK = f"{__name__}:check"
ROWS = (
    ("attention.cache", {**CACHE, **WINDOWS}, HEAD_AXES, HEAD_ENDS),
    ("attention.prefill", {**READER, **WINDOWS}, HEAD_AXES, HEAD_ENDS),
    ("attention.decode", {**READER, **WINDOWS}, HEAD_AXES, HEAD_ENDS),
    ("attention.step", STEP, STEP_AXES, HEAD_ENDS),
    ("mla.cache", CACHE, LATENT_AXES, LATENT_ENDS),
    ("mla.prefill", READER, LATENT_AXES, LATENT_ENDS),
    ("mla.decode", READER, LATENT_AXES, LATENT_ENDS),
)
FAMILIES = {
    op: Family(axes=axes, shapes=shapes, quick=QUICK, questions=None, check=_CHECK, ends=ends)
    for op, shapes, axes, ends in ROWS
}
