"""Level 4: collectives between real processes: values, groups, order, and peers that are gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grpo_core.catalogue import Offer
from grpo_core.plugins import Raised, attempt

from ..case import Case, Outcome, Target, failed, passed
from ..comm.crew import Crew, start
from ..comm.lost import COLLECTIVES, MANNERS
from ..comm.rank import Answer
from ..ops.facts import refused
from ..target import is_simulated

OP = "comm.collectives"
COMM = "grpo_conformance.comm"
HOST = "cpu"
WORLDS = (1, 2, 3, 4)
QUESTIONS: Mapping[str, str] = {
    "declared": "together:declared",
    "all_reduce": "reductions:all_reduce",
    "reduce_scatter": "reductions:reduce_scatter",
    "emulations": "reductions:emulations",
    "all_gather": "moves:all_gather",
    "broadcast": "moves:broadcast",
    "all_to_all": "moves:all_to_all",
    "gather_objects": "moves:gather_objects",
    "barrier": "together:barrier",
    "groups": "together:groups",
    "order": "together:order",
    "refusals": "together:refusals",
    "rejoin": "together:rejoin",
}
"""What is asked of each world, the last of it leaves the world anew."""
QUICK_WORLDS: Mapping[int, tuple[str, ...]] = {3: tuple(QUESTIONS), 4: ("groups", "all_to_all")}
"""An odd number of ranks, by which averages are not exact, and an even one with disjoint groups of two."""
TIMEOUT = 30.0
"""Of groups whose ranks are all there; generous, because machines are busy."""
SHORT, SHORTER = 4.0, 2.0
"""Of groups that lose a rank, the second for a quick run."""
QUICK_MANNERS = ("dead before", "dead amid", "silent")
LATE = 4.0
"""Seconds above a timeout that an error may take: threads that look for it sleep. What the machine was away
for comes on top."""
MARGIN = 10.0
"""Seconds above a timeout after which a call hangs, and its process is ended."""
LIMIT = 240.0
"""Seconds of a case, far above what the limits within it add up to."""


def cases(target: Target, *, quick: bool) -> Iterable[Case]:
    """For each offer the questions of each world that it serves, then the peers that are gone."""
    for offer in target.offers.get(OP, ()):
        info = target.probe.info
        served = [world for world in WORLDS if refused(offer, info, {"world": world}) is None]
        able = [world for world in served if _room_for(target, world)]
        for world in (world for world in served if world not in able):
            yield _case(offer, f"world{world}/devices", "too_few", {"world": world})
        yield from _questions(offer, able, quick)
        several = sorted((world for world in able if world > 1), key=lambda world: abs(world - 3))
        if several:
            yield from _losses(offer, several[0], quick)
        if not served:
            yield _case(offer, "served", "not_served", {})


def _questions(offer: Offer, worlds: Sequence[int], quick: bool) -> Iterator[Case]:
    few = {world: QUICK_WORLDS[world] for world in worlds if world in QUICK_WORLDS}
    for world in worlds:
        asked = tuple(QUESTIONS) if not quick or not few else few.get(world, ())
        for name in asked:
            args = {"world": world, "question": name, "seed": 0, "few": quick}
            yield _case(offer, f"world{world}/{name}", "answers", args)
        if offer.impl.deterministic and "all_reduce" in asked and world > 1:
            yield _case(offer, f"world{world}/determinism", "determinism", {"world": world, "seed": 0})


def _losses(offer: Offer, world: int, quick: bool) -> Iterator[Case]:
    timeout = SHORTER if quick else SHORT
    yield _case(offer, "lost/never comes", "never_comes", {"world": world, "timeout": timeout})
    base: dict[str, Any] = {"world": world, "timeout": timeout, "victim": world - 1}
    for manner in QUICK_MANNERS if quick else MANNERS:
        once = quick or manner in ("dead amid", "left")
        asked = ("all_reduce",) if once else COLLECTIVES
        args = {**base, "manner": manner, "collectives": list(asked)}
        yield _case(offer, f"lost/{manner}", "lost", args)
    if not quick:
        args = {**base, "manner": "dead before", "collectives": ["all_reduce"], "victim": 0}
        yield _case(offer, "lost/first dead before", "lost", args)


def _case(offer: Offer, name: str, check: str, args: Mapping[str, Any]) -> Case:
    return Case(
        id=f"collectives/{offer.id}/{name}".replace(" ", "-"),
        level=4,
        subject=f"{OP} {offer.id}",
        run=f"{__name__}:{check}",
        args={"offer_id": offer.id, **args},
        # The offer runs in the ranks' processes, never in the room's own.
        room=OP,
        timeout=LIMIT,
        timed=True,
    )


def too_few(target: Target, *, offer_id: str, world: int) -> Outcome:
    """A world that the offer declares and this machine has no devices for."""
    message = f"{world} processes need a device each, and there are {target.probe.info.count}"
    return Outcome(status="not_declared", message=message)


def not_served(target: Target, *, offer_id: str) -> Outcome:
    """No world of one to four ranks is declared."""
    return Outcome(status="not_declared", message=f"serves none of {', '.join(map(str, WORLDS))} ranks")


def answers(target: Target, *, offer_id: str, world: int, question: str, seed: int, few: bool) -> Outcome:
    """One question to all ranks of a world, which is kept for the next one as long as all answer."""
    crew = KEPT.world(target, offer_id, world)
    if isinstance(crew, Outcome):
        return crew
    args: dict[str, Any] = {"seed": seed, "few": few}
    if question == "rejoin":
        args |= {"timeout": TIMEOUT, "store": crew.store("tcp") if world > 1 else ""}
    found = crew.ask(f"{COMM}.{QUESTIONS[question]}", args, limit=TIMEOUT + MARGIN)
    if any(answer.status != "value" for answer in found):
        KEPT.close()
    outcome = judged(found, {"seed": seed, "world": world})
    if outcome.status != "pass":
        return outcome
    if found[0].value.get("native"):
        return Outcome(status="not_declared", message="the average is native")
    if question == "barrier":
        return _apart(found, outcome)
    return _same_bits(found, outcome) if question == "all_reduce" else outcome


def determinism(target: Target, *, offer_id: str, world: int, seed: int) -> Outcome:
    """The same reductions give the same bits again, and in a world of new processes."""
    runs: list[list[Answer]] = []
    for again in (False, False, True):
        if again:
            KEPT.close()
        crew = KEPT.world(target, offer_id, world)
        if isinstance(crew, Outcome):
            return crew
        for question in ("all_reduce", "reduce_scatter"):
            args = {"seed": seed, "few": True}
            found = crew.ask(f"{COMM}.{QUESTIONS[question]}", args, limit=TIMEOUT + MARGIN)
            if any(answer.status != "value" for answer in found):
                KEPT.close()
                return judged(found, {"seed": seed, "world": world})
            runs.append(found)
    for first, later in zip(runs * 2, runs[2:], strict=False):
        for one, other in zip(first, later, strict=True):
            changed = [name for name, bits in one.value["bits"].items() if other.value["bits"][name] != bits]
            if changed:
                said = f"rank {one.rank}: {len(changed)} results have other bits in another run"
                return failed(said, worst={"question": changed[0], "seed": seed, "world": world})
    return passed(figures={"results": float(len(runs[0][0].value["bits"]) + len(runs[1][0].value["bits"]))})


def never_comes(target: Target, *, offer_id: str, world: int, timeout: float) -> Outcome:
    """The first and the last rank wait in vain for the others at a store of each kind."""
    crew = crew_for(target, offer_id, 4)
    if isinstance(crew, Outcome):
        return crew
    try:
        args: list[dict[str, Any]] = [
            {"rank": rank, "world": world, "timeout": timeout, "store": crew.store(kind, f"{kind}{rank}")}
            for kind in ("tcp", "file")
            for rank in (0, world - 1)
        ]
        crew.tell(f"{COMM}.lost:forlorn", args)
        found = crew.hear(limit=timeout + MARGIN, grace=None)
    finally:
        crew.close()
    for answer, asked in zip(found, args, strict=True):
        problem = _loss(answer, timeout)
        if problem:
            return failed(f"rank {asked['rank']} of {world} at {asked['store'][:7]}: {problem}", worst=asked)
    return passed(figures={"seconds": max(answer.value["longest"] for answer in found)})


def lost(
    target: Target, *, offer_id: str, world: int, victim: int, manner: str, collectives: Sequence[str],
    timeout: float,
) -> Outcome:  # fmt: skip
    """A peer is gone: each of the others gets an error in time and can leave. One world for each collective;
    they wait at the same time."""
    crews: dict[str, Crew] = {}
    try:
        for name in collectives:
            crew = crew_for(target, offer_id, world, timeout=timeout)
            if isinstance(crew, Outcome):
                # So short a timeout may be over on a busy machine before everybody came.
                crew = crew_for(target, offer_id, world, timeout=timeout)
            if isinstance(crew, Outcome):
                return crew
            crews[name] = crew
            args = {"manner": manner, "collective": name, "victim": victim}
            crew.tell(f"{COMM}.lost:bereft", [args] * world)
        return _survived(crews, timeout, {"manner": manner, "world": world, "victim": victim})
    finally:
        for crew in crews.values():
            crew.close()


def _survived(crews: Mapping[str, Crew], timeout: float, worst: Mapping[str, Any]) -> Outcome:
    figures = {}
    for name, crew in crews.items():
        rest = [rank for rank in range(len(crew.links)) if rank != worst["victim"]]
        # Each call may take the timeout, and closing as long again.
        found = crew.hear(rest, limit=4 * timeout + MARGIN, grace=None)
        for answer in found:
            problem = _loss(answer, timeout)
            if problem:
                return failed(f"{name}, rank {answer.rank}: {problem}", worst={**worst, "collective": name})
        figures[f"{name}_seconds"] = max(answer.value["longest"] for answer in found)
    return passed(figures=figures)


def _loss(answer: Answer, timeout: float) -> str:
    """What is wrong with a rank whose peer is gone."""
    if answer.status == "silent":
        return f"it hangs: {answer.text}, and the timeout is {timeout:.0f} s"
    if answer.status == "died":
        return f"{answer.text}, which is no error that a caller can handle"
    if answer.status == "raised":
        return f"leaving after the error raised {answer.text}"
    value = answer.value
    if not value["raised"]:
        return "every call succeeds"
    if not value["sound"]:
        return f"raised {value['raised'][:300]}, which is neither a GrpoError nor a RuntimeError"
    if value["longest"] > timeout + LATE + answer.away:
        return f"the error came after {value['longest']:.1f} s, and the timeout is {timeout:.0f} s"
    return ""


def judged(found: Sequence[Answer], worst: Mapping[str, Any]) -> Outcome:
    """One outcome of what every rank found about its own results."""
    bad = [answer for answer in found if answer.status != "value"]
    # A rank that died or raised says more than one that waits for it.
    for status, words in (("died", ""), ("raised", "raised "), ("silent", "it hangs: ")):
        for answer in (answer for answer in bad if answer.status == status):
            return failed(f"rank {answer.rank} of {len(found)}: {words}{answer.text}", worst=worst)
    told = [answer.value for answer in found]
    figures = {"comparisons": float(sum(value["count"] for value in told))}
    measured = [value for value in told if value["error"] is not None]
    largest = max(measured, key=lambda value: value["error"] / value["tolerance"], default=None)
    share: dict[str, Any] = {}
    if largest is not None:
        share = {"error": largest["error"], "tolerance": largest["tolerance"]}
        worst = {**worst, **largest["worst"], "rank": told.index(largest)}
    for rank, value in enumerate(told):
        for broken in value["broken"]:
            problem = broken.get("problem") or f"{broken['got']} instead of {broken['wanted']}"
            message = f"{broken['question']}, rank {rank} of {len(found)}: {problem}"
            return failed(message, worst={**worst, "rank": rank, **broken}, figures=figures, **share)
    return passed(worst=worst, figures=figures, **share)


def _same_bits(found: Sequence[Answer], outcome: Outcome) -> Outcome:
    """What was reduced in place is the same on all ranks, to the bit."""
    first = found[0].value["bits"]
    for answer in found[1:]:
        for name, bits in answer.value["bits"].items():
            if "," not in name and first[name] != bits:
                return failed(f"{name}: ranks 0 and {answer.rank} hold other bits", worst=outcome.worst)
    return outcome


def _apart(found: Sequence[Answer], outcome: Outcome) -> Outcome:
    """Nobody has left a barrier before the last one came to it."""
    for turn, times in enumerate(zip(*(answer.value["came"] for answer in found), strict=True)):
        left = [answer.value["left"][turn] for answer in found]
        if min(left) < max(times):
            early = f"{1000 * (max(times) - min(left)):.1f} ms before rank {times.index(max(times))} came"
            return failed(f"barrier {turn}: rank {left.index(min(left))} left {early}", worst=outcome.worst)
    return outcome


class Kept:
    """The world that the cases of one room ask in turn. A process holds one at a time."""

    def __init__(self) -> None:
        self.key: tuple[str, str, int] | None = None
        self.crew: Crew | None = None

    def world(self, target: Target, offer_id: str, world: int) -> Crew | Outcome:
        """The joined world, started where it is not the one of before."""
        key = (target.device.name, pointer_of(target, offer_id), world)
        if self.crew is not None and self.key == key:
            return self.crew
        self.close()
        crew = crew_for(target, offer_id, world, timeout=TIMEOUT)
        if isinstance(crew, Crew):
            self.key, self.crew = key, crew
        return crew

    def close(self) -> None:
        """End its processes."""
        if self.crew is not None:
            self.crew.close()
        self.key = self.crew = None


KEPT = Kept()


def crew_for(target: Target, offer_id: str, size: int, *, timeout: float | None = None) -> Crew | Outcome:
    """Processes for an offer, joined to a world where a timeout is given; else the outcome of trying."""
    count = target.probe.info.count
    indices = [0 if target.device.type == HOST else rank % count for rank in range(size)]
    crew = attempt(lambda: start(target.device.name, pointer_of(target, offer_id), indices))
    if isinstance(crew, Raised):
        return Outcome(status="error", message=str(crew.error).replace("\n", ";"))
    if timeout is None:
        return crew
    store = crew.store("file") if size > 1 else ""
    args = [{"rank": rank, "world": size, "store": store, "timeout": timeout} for rank in range(size)]
    found = crew.ask_each(f"{COMM}.lost:meet", args, limit=timeout + MARGIN)
    if all(answer.status == "value" for answer in found):
        return crew
    crew.close()
    problem = next(answer for answer in found if answer.status != "value")
    said = f"rank {problem.rank} of {size} could not join: {problem.text}"
    return failed(said.replace("\n", ";"), worst={"world": size})


def pointer_of(target: Target, offer_id: str) -> str:
    """Where the code of an offer is."""
    return next(offer.impl.load for offer in target.offers[OP] if offer.id == offer_id)


def _room_for(target: Target, world: int) -> bool:
    """Whether each rank can have a device of its own, as backends of real devices ask for."""
    shared = target.device.type == HOST or is_simulated(target)
    return shared or world <= target.probe.info.count
