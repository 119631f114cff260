"""The level of collectives on right ones and on ones that are wrong in one known way."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_conformance.case import Case, Outcome, Target, check_of
from grpo_conformance.comm import crew as crews
from grpo_conformance.comm.draws import bound, draw, reduced
from grpo_conformance.comm.moves import count_tables
from grpo_conformance.comm.rank import Answer
from grpo_conformance.levels import collectives as level
from grpo_conformance.target import open_target
from grpo_conformance.worker import Worker
from grpo_core.catalogue import Offer
from grpo_core.devices.torch_device import TorchDevice
from grpo_core.impl import Impl

sys.path.insert(0, str(Path(__file__).parent))  # the ranks import faulty_collectives by name

FAULTS = (
    ("transposed", "all_to_all", "all_to_all"),
    ("swapped", "all_to_all", "rank"),
    ("undivided", "all_reduce", "avg"),
    ("undivided", "emulations", "average of whole numbers"),
    ("reciprocal", "emulations", "average of whole numbers"),
    ("coarse", "all_reduce", "all_reduce sum float32"),
    ("floated", "all_reduce", "all_reduce sum int64"),
    ("strides", "all_reduce", "transposed"),
    ("unequal", "all_reduce", "hold other bits"),
    ("restless", "determinism", "other bits in another run"),
    ("input_gone", "reduce_scatter", "input after it"),
    ("nan_lost", "all_reduce", "not finite"),
    ("wrong_order", "all_gather", "all_gather"),
    ("no_barrier", "barrier", "left"),
    ("accepts", "refusals", "unknown op"),
    ("crashes", "broadcast", "SIGABRT"),
    ("LostGroup", "groups", "rank"),
    ("StaysAfterClose", "rejoin", "already"),
)
"""Attribute of faulty_collectives, the question that must see it, and words of what it says."""


def target_of(name: str) -> Target:
    """The CPU with nothing but one offer of collectives."""
    impl = Impl(op=level.OP, name=name, device="cpu", load=f"faulty_collectives:{name}",
                limits={"world": range(2, 5)}, deterministic=True)  # fmt: skip
    return replace(open_target("cpu"), offers={level.OP: (Offer(plugin="faulty", impl=impl),)})


def asked(name: str, suffix: str, **changes: Any) -> Outcome:
    """The outcome of one case of the level."""
    target = target_of(name)
    case = next(case for case in level.cases(target, quick=False) if case.id.endswith(suffix))
    outcome = check_of(case)(target, **{**case.args, **changes})
    assert isinstance(outcome, Outcome)
    return outcome


@pytest.fixture(autouse=True)
def no_crew_left() -> Iterator[None]:
    yield
    level.KEPT.close()


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_healthy_collectives_pass(device: str) -> None:
    if device == "sim" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    worker = Worker(device)
    try:
        found = {case.id: worker.run(case) for case in level.cases(open_target(device), quick=True)}
    finally:
        worker.close()
    assert {name: row for name, row in found.items() if row.status not in ("pass", "not_declared")} == {}
    own = {name: row.status for name, row in found.items() if f"/{device}:" in name}
    assert set(own.values()) == {"pass"}
    assert len(own) >= 18
    shares = [row.error / row.tolerance for row in found.values() if row.error is not None and row.tolerance]
    assert 0 < max(shares) <= 1


@pytest.mark.parametrize(("name", "question", "words"), FAULTS)
def test_a_fault_is_seen(name: str, question: str, words: str) -> None:
    changes = {} if question == "determinism" else {"few": True}
    outcome = asked(name, f"world3/{question}", **changes)
    assert outcome.status == "fail"
    assert words in outcome.message
    assert {"seed", "world"} <= set(outcome.worst)


@pytest.mark.slow
def test_a_call_that_hangs_is_ended_and_told_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level, "TIMEOUT", 6.0)
    monkeypatch.setattr(level, "MARGIN", 1.0)
    began = time.monotonic()
    outcome = asked("hangs", "world3/all_gather", few=True)
    assert outcome.status == "fail"
    assert "it hangs" in outcome.message and "faulty_collectives.py" in outcome.message
    assert time.monotonic() - began < 60
    assert asked("hangs", "world3/broadcast").status == "pass"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aborts", "SIGABRT"),
        ("silent_loss", "every call succeeds"),
        ("odd_error", "neither a GrpoError nor a RuntimeError"),
    ],
)
def test_a_dying_peer_handled_badly_is_seen(name: str, words: str) -> None:
    outcome = asked(name, "lost/dead-before", collectives=["all_reduce"])
    assert outcome.status == "fail"
    assert words in outcome.message
    assert outcome.worst["collective"] == "all_reduce"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "changes"), [("lost/never-comes", {}), ("lost/silent", {"collectives": ["barrier"]})]
)
def test_a_timeout_that_is_not_kept_is_a_hang(
    suffix: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(level, "MARGIN", 1.0)
    outcome = asked("Patient", suffix, timeout=2.0, **changes)
    assert outcome.status == "fail"
    assert "it hangs" in outcome.message


def test_an_offer_that_cannot_be_imported_is_told() -> None:
    outcome = asked("nothing_of_this_name", "world3/declared")
    assert outcome.status == "error"
    assert "nothing_of_this_name" in outcome.message


def test_ranks_end_with_the_suite_and_leave_no_folder() -> None:
    crew = crews.start("cpu", "grpo_core.ops.reference.collectives:SingleProcess", [0, 0])
    crew.tell("time:sleep", [{}, {}])  # not a question: each answers with an error
    assert {answer.status for answer in crew.hear(limit=30)} == {"raised"}
    crew.close()
    assert not any(process.is_alive() for process in crew.processes)
    assert not crew.folder.exists()


def test_worlds_without_a_device_for_each_rank_are_not_declared() -> None:
    target = target_of("undivided")
    (offer,) = target.offers[level.OP]
    info = replace(target.probe.info, count=2, type="chip")
    chips = replace(
        target,
        device=TorchDevice(name="chip", type="chip", vendor="", visible_env="", comm=""),
        probe=replace(target.probe, info=info),
        offers={level.OP: (replace(offer, impl=replace(offer.impl, device="chip")),)},
    )
    found = {case.id.removeprefix("collectives/faulty:undivided/"): case
             for case in level.cases(chips, quick=False)}  # fmt: skip
    assert {"world3/devices", "world4/devices", "world2/all_reduce", "lost/silent"} <= set(found)
    assert not [name for name in found if name.startswith(("world3", "world4")) and "devices" not in name]
    assert found["lost/silent"].args["world"] == 2
    outcome = check_of(found["world4/devices"])(chips, **found["world4/devices"].args)
    assert outcome.status == "not_declared"
    assert "there are 2" in outcome.message


def test_the_bound_holds_for_every_order_of_sums_and_not_for_a_coarser_dtype() -> None:
    parts = [draw(3, rank, "x", "float32", (500,)) for rank in range(4)]
    wanted, allowed = reduced(parts, "sum"), bound(parts, "sum")
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        total = torch.zeros(500)
        for rank in order:
            total += parts[rank]
        assert bool(((total.double() - wanted).abs() <= allowed).all())
    coarse = sum(part.bfloat16() for part in parts)
    assert isinstance(coarse, torch.Tensor)
    assert bool(((coarse.double() - wanted).abs() > allowed).any())


def test_draws_and_counts_follow_from_the_seed() -> None:
    assert torch.equal(draw(1, 2, "x", "int64", (9,)), draw(1, 2, "x", "int64", (9,)))
    assert not torch.equal(draw(1, 2, "x", "int64", (9,)), draw(2, 2, "x", "int64", (9,)))
    assert count_tables(3, 5) == count_tables(3, 5)
    transposed = [list(row) for row in zip(*count_tables(3, 5)["in a ring"], strict=True)]
    assert transposed != count_tables(3, 5)["in a ring"]


def test_cases_survive_a_trip_and_are_unique() -> None:
    for quick in (True, False):
        found = list(level.cases(open_target("cpu"), quick=quick))
        assert len({case.id for case in found}) == len(found)
        assert all(isinstance(case, Case) and case.level == 4 and " " not in case.id for case in found)


def test_an_error_that_comes_late_is_excused_by_a_machine_that_was_away_and_by_nothing_else() -> None:
    value = {"raised": "RuntimeError: timed out", "sound": True, "longest": 2.0 + level.LATE + 3.0}
    late = Answer(rank=0, status="value", value=value)
    assert "the error came after 9.0 s" in level._loss(late, 2.0)
    assert "the error came after" in level._loss(replace(late, away=2.9), 2.0)
    assert level._loss(replace(late, away=3.1), 2.0) == ""
