"""How readers of a cache are asked: sequences alone and together, and cut into calls in other ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .alone import differing, orders
from .cache_kits import Heads, Kit, Stepped
from .facts import Facts
from .question import cumulative, normal, seeded

LENGTHS = (5, 1, 17, 64, 130, 33)
SLOTS, TOKENS = 16, 1200


def first_difference(cache: Any, readers: Mapping[str, Any], kit: Kit, device: torch.device) -> str:
    """Where a sequence's results have other bits in company, or cut into calls otherwise; empty for nowhere.

    `readers` are those of one plugin that declare to be batch-invariant: prefill, decode, step.
    """
    if "step" in readers:
        return _stepped(cache, readers["step"], kit, device)
    generator = seeded(82)
    rows = [normal(generator, length, kit.width, dtype=kit.dtype) for length in LENGTHS]
    queries = [normal(generator, length, *kit.queries, dtype=kit.dtype) for length in LENGTHS]
    alone = [_life(cache, readers, kit, device, [rows[i]], [queries[i]])[0] for i in range(len(LENGTHS))]
    for name, chosen in orders(len(LENGTHS)):
        found = _life(cache, readers, kit, device, [rows[i] for i in chosen], [queries[i] for i in chosen])
        for place, results in enumerate(found):
            told = differing(alone[chosen[place]], results)
            if told:
                tokens = LENGTHS[chosen[place]]
                return f"sequence {chosen[place]} of {tokens} tokens: {name}, at place {place}: {told}"
    return _cut(cache, readers, kit, device, rows, queries, alone)


def _life(
    cache: Any, readers: Mapping[str, Any], kit: Kit, device: torch.device, rows: Sequence[Tensor],
    queries: Sequence[Tensor],
) -> list[list[Tensor]]:  # fmt: skip
    """All queries of each sequence by prefill, and its last one by decode, where these are there."""
    made = cache(kit.spec(device, SLOTS, TOKENS))
    slots = [made.allocate(len(x)) for x in rows]
    _write(made, kit, device, rows, slots)
    found: list[list[Tensor]] = [[] for _ in rows]
    lengths = [len(x) for x in rows]
    given = {"seqlens_k": torch.tensor(lengths), "slots": torch.tensor(slots)}
    if "prefill" in readers:
        ends = {**given, "cu_seqlens_q": cumulative(lengths)}
        o = _read(readers["prefill"], made, kit, device, torch.cat(list(queries)), ends)
        for one, part in zip(found, torch.split(o, lengths), strict=True):
            one.append(part)
    if "decode" in readers:
        o = _read(readers["decode"], made, kit, device, torch.cat([q[-1:] for q in queries]), given)
        for one, part in zip(found, torch.split(o, 1), strict=True):
            one.append(part)
    return found


def _cut(
    cache: Any, readers: Mapping[str, Any], kit: Kit, device: torch.device, rows: Sequence[Tensor],
    queries: Sequence[Tensor], alone: Sequence[Sequence[Tensor]],
) -> str:  # fmt: skip
    """The longest sequence in two prefills; and its last token by decode is that of the prefill."""
    longest = max(range(len(LENGTHS)), key=lambda i: LENGTHS[i])
    length, whole = LENGTHS[longest], alone[longest]
    if {"prefill", "decode"} <= readers.keys():
        told = differing([whole[0][-1:]], [whole[1]])
        if told:
            return f"the last token of {length} by decode, not prefill: {told}"
    for at in (1, length // 2 + 2, length - 1) if "prefill" in readers else ():
        made = cache(kit.spec(device, SLOTS, TOKENS))
        slot = made.allocate(length)
        pieces = []
        for start, end in ((0, at), (at, length)):
            _write(made, kit, device, [rows[longest][start:end]], [slot], start)
            given = {"seqlens_k": torch.tensor([end]), "slots": torch.tensor([slot]),
                     "cu_seqlens_q": cumulative([end - start])}  # fmt: skip
            pieces.append(_read(readers["prefill"], made, kit, device, queries[longest][start:end], given))
        told = differing([whole[0]], [torch.cat(pieces)])
        if told:
            return f"a sequence of {length} tokens in prefills of {at} and {length - at}: {told}"
    return ""


def _write(
    cache: Any, kit: Kit, device: torch.device, rows: Sequence[Tensor], slots: Sequence[int], start: int = 0
) -> None:
    first, second = kit.parts(torch.cat(list(rows)).to(device))
    owners = torch.cat([torch.full((len(x),), slot) for x, slot in zip(rows, slots, strict=True)])
    places = torch.cat([torch.arange(start, start + len(x)) for x in rows])
    for layer in cache.layers:
        layer.write(first, second, slots_T=owners.to(device), positions_T=places.to(device))


def _read(
    reader: Any, cache: Any, kit: Kit, device: torch.device, q: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    rest = {name: x.to(device) for name, x in given.items()}
    with torch.no_grad():
        return kit.read(reader, q.to(device), cache.layers[0], None, **rest).detach().cpu()


def _stepped(cache: Any, step: Any, kit: Kit, device: torch.device) -> str:
    """One fused step of each sequence."""
    assert isinstance(kit, Heads)
    generator = seeded(83)
    rows = [normal(generator, length, kit.width, dtype=kit.dtype) for length in LENGTHS]
    drawn = Stepped.draw(kit, generator, list(LENGTHS), list(range(len(LENGTHS)))).tensors

    def ask(chosen: Sequence[int]) -> Tensor:
        made = cache(kit.spec(device, SLOTS, TOKENS))
        slots = [made.allocate(LENGTHS[i] + 1) for i in chosen]
        _write(made, kit, device, [rows[i] for i in chosen], slots)
        given: Facts = {
            name: (x if name in ("q_norm", "k_norm") else x[list(chosen)]).to(device)
            for name, x in drawn.items()
        }
        given = {**given, "slots": torch.tensor(slots, device=device)}
        rest = {name: x for name, x in given.items() if name != "qkv_BW"}
        plain = Stepped(tensors=drawn).rest(kit, None)
        with torch.no_grad():
            out: Tensor = step(given["qkv_BW"], made.layers[0], **rest, **plain)
        return out.detach().cpu()

    alone = [ask([i]) for i in range(len(LENGTHS))]
    for name, chosen in orders(len(LENGTHS)):
        for place, part in enumerate(torch.split(ask(chosen), 1)):
            told = differing([alone[chosen[place]]], [part])
            if told:
                return f"sequence {chosen[place]}: {name}, at place {place}: {told}"
    return ""
