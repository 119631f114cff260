"""The plan as data: round trip, id, comparison, replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_helpers import ACME, CPU, VARLEN, catalogue_of, offer

from grpo_core.catalogue import Catalogue, PluginInfo
from grpo_core.errors import PlanError
from grpo_core.impl import Need
from grpo_core.plan import Plan, diff, from_json, load_plan
from grpo_core.resolve import replay, resolve

NEEDS = [VARLEN, Need(op="norm.rms", facts={"dtype": "bfloat16"}), Need(op="attention.step", required=False)]


def catalogue(*, rank: int = 50, version: str = "1.0") -> Catalogue:
    found = catalogue_of({
        "p": [offer(name="a", rank=rank), offer(name="b", rank=40), offer("norm.rms")],
        "idle": [],
    })  # fmt: skip
    info = PluginInfo(id="p", distribution="dist-p", version=version, module="p", hooks=())
    return replace(found, plugins=(info, found.plugins[1]))


def plan(**settings: Any) -> Plan:
    return resolve(NEEDS, catalogue(), CPU, **settings)


def test_a_plan_survives_json_whole(tmp_path: Path) -> None:
    made = plan(pins={"optim.adamw": "p:a"})
    assert from_json(json.loads(json.dumps(made.to_json()))) == made
    made.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plan_json_has_a_stable_schema() -> None:
    content = plan().to_json()
    assert content["schema"] == 1
    assert sorted(content) == ["choices", "device", "fallback", "id", "notes", "plugins", "schema"]
    assert sorted(content["choices"][0]) == [
        "chosen", "contract", "covered_by", "facts", "fallback", "load", "op", "passed", "pinned", "rank",
        "reason",
    ]  # fmt: skip
    assert content["plugins"][1] == {"id": "p", "distribution": "dist-p", "version": "1.0"}


def test_the_id_follows_what_runs_and_nothing_else() -> None:
    made = plan()
    assert len(made.id) == 8 and made.id == plan().id
    assert made.id == replace(made, notes=("other",)).id
    assert made.id == replace(made, device=replace(CPU, name="another processor")).id
    different = [
        resolve(NEEDS, catalogue(rank=10), CPU),
        resolve(NEEDS, catalogue(version="1.1"), CPU),
        replace(made, device=ACME),
    ]
    assert len({made.id, *(other.id for other in different)}) == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, "schema 2, this grpo-core reads 1"),
        ({"choices": None}, "TypeError"),
        ({"device": {"type": "cpu"}}, "KeyError"),
        ({"fallback": "reference", "id": "00000000"}, "its id is '00000000'"),
    ],
)
def test_a_damaged_plan_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(PlanError) as raised:
        from_json({**plan().to_json(), **change})
    assert expected in raised.value.why


def test_an_edited_choice_is_noticed() -> None:
    content = plan().to_json()
    content["choices"][2]["chosen"] = "p:other"
    with pytest.raises(PlanError, match="damaged or was edited"):
        from_json(content)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError):
        load_plan(path)


def test_diff_tells_what_changed_and_only_that() -> None:
    before, after = plan(), resolve(NEEDS, catalogue(rank=10, version="1.1"), CPU)
    found = [(item.what, item.before, item.after) for item in diff(before, after)]
    assert found == [("attention.varlen", "p:a", "p:b"), ("plugin p", "dist-p 1.0", "dist-p 1.1")]
    assert diff(before, before) == ()
    absent = diff(before, resolve(NEEDS[:1], catalogue(), CPU))
    assert [(item.what, item.after) for item in absent] == [
        ("attention.step", "absent"),
        ("norm.rms", "absent"),
    ]


def test_replay_keeps_choices_that_ranks_would_change() -> None:
    again = replay(plan(), NEEDS, catalogue(rank=10), CPU)
    assert again.choice("attention.varlen").chosen == "p:a"
    assert f"replays plan {plan().id}" in again.notes


def test_replay_of_a_pinned_plan_gives_the_same_id_every_time() -> None:
    once = replay(plan(), NEEDS, catalogue(), CPU)
    assert plan().id == once.id == replay(once, NEEDS, catalogue(), CPU).id


def test_replay_keeps_an_optional_op_unserved_although_a_newer_plugin_serves_it() -> None:
    newer = catalogue_of({"p": [offer(name="a"), offer("norm.rms"), offer("attention.step")]})
    assert resolve(NEEDS, newer, CPU).choice("attention.step").chosen == "p:fast"
    assert replay(plan(), NEEDS, newer, CPU).choice("attention.step").chosen is None


def test_replay_of_a_covered_op_that_had_no_offer_of_its_own() -> None:
    needs = [Need(op="attention.decode"), Need(op="attention.step", required=False)]
    offers = catalogue_of({"p": [offer("attention.step")]})
    made = resolve(needs, offers, CPU)
    assert made.choice("attention.decode").covered_by == "attention.step"
    again = replay(made, needs, offers, CPU)
    assert again.id == made.id and again.notes == (f"replays plan {made.id}",)


def test_replay_stops_when_a_choice_does_not_survive() -> None:
    with pytest.raises(PlanError, match=r"ops\.attention\.varlen is pinned to p:a") as raised:
        replay(plan(), NEEDS, catalogue_of({"p": [offer(name="b"), offer("norm.rms")]}), CPU)
    assert raised.value.fix.endswith("p:b")


def test_replay_tells_of_new_ops_and_other_versions() -> None:
    needs = [*NEEDS, Need(op="mlp.swiglu")]
    newer = replace(
        catalogue(version="2.0"),
        offers={**catalogue().offers, **catalogue_of({"p": [offer("mlp.swiglu")]}).offers},
    )
    again = replay(plan(), needs, newer, CPU)
    assert again.choice("mlp.swiglu").chosen == "p:fast"
    assert f"mlp.swiglu is new since plan {plan().id}" in again.notes
    assert "plugin p is 2.0, it was 1.0" in again.notes


def test_replay_and_a_pin_that_disagree_stop() -> None:
    with pytest.raises(PlanError, match="pinned to p:b in the config and to p:a by the plan"):
        replay(plan(), NEEDS, catalogue(), CPU, pins={"attention.varlen": "p:b"})
    replay(plan(), NEEDS, catalogue(), CPU, pins={"attention.varlen": "p:a"})


def test_replay_on_another_device_stops() -> None:
    with pytest.raises(PlanError) as raised:
        replay(plan(), NEEDS, catalogue(), ACME)
    assert raised.value.why == "for cpu, not acme"
