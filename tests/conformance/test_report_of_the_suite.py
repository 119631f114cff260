"""The report: verdicts, digest, signature, comparison, known failures, the page."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from grpo_conformance.case import Case, Outcome
from grpo_conformance.diff import compare
from grpo_conformance.html import page
from grpo_conformance.known import advice, read_known, told
from grpo_conformance.report import build, read, write
from grpo_conformance.sign import problem, sign
from grpo_conformance.target import open_target
from grpo_core.cli.main import main
from grpo_core.errors import ConfigError


def result(name: str, outcome: Outcome, subject: str = "cpu:a", level: int = 2) -> tuple[Case, Outcome]:
    return Case(id=f"ops/x/{subject}/{name}", level=level, subject=subject, run="m:f"), outcome


GOOD = Outcome(status="pass", error=1e-6, tolerance=1e-5, worst={"shape": [3, 4]})
CLOSE = Outcome(status="pass", error=9e-6, tolerance=1e-5)
BAD = Outcome(status="fail", message="<b>wrong</b>", error=float("nan"), tolerance=1e-5, worst={"seed": 4})


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    results = [
        result("good", GOOD),
        result("close", CLOSE),
        result("bad", BAD, subject="cpu:b"),
        result("later", Outcome(status="not_declared", message="no float64"), subject="cpu:c"),
    ]
    return build(open_target("cpu"), results, levels=[2, 3], quick=False, command="grpo conformance cpu")


def test_verdicts_by_level_and_subject(content: dict[str, Any]) -> None:
    assert content["verdict"] == "fail"
    assert [(row["name"], row["verdict"]) for row in content["levels"]] == [
        ("ops", "fail"),
        ("memory", "not_declared"),
    ]
    subjects = {row["subject"]: row for row in content["subjects"]}
    assert {name: row["verdict"] for name, row in subjects.items()} == {
        "cpu:a": "pass",
        "cpu:b": "fail",
        "cpu:c": "not_declared",
    }
    assert subjects["cpu:a"]["worst"]["id"].endswith("close")
    assert subjects["cpu:b"]["worst"]["worst"] == {"seed": 4}
    assert content["target"]["simulated"] is False


def test_a_changed_report_is_not_valid(content: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "r.json", content)
    held = read(tmp_path / "r.json")
    assert problem(held) is None
    held["cases"][2]["status"] = "pass"
    assert "digest" in str(problem(held))


def test_a_signature_names_its_maker(content: dict[str, Any], tmp_path: Path) -> None:
    for name in ("maker", "other"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True
        )
    public = (tmp_path / "maker.pub").read_text().split()
    signers = tmp_path / "signers"
    signers.write_text(f"chips@example.org {public[0]} {public[1]}\n")
    signed = content | {"signature": sign(content, tmp_path / "maker")}
    write(tmp_path / "r.json", signed)
    held = read(tmp_path / "r.json")
    assert problem(held, signers=signers, identity="chips@example.org") is None
    assert problem(held, signers=signers, identity="someone@example.org") is not None
    forged = content | {"signature": sign(content, tmp_path / "other")}
    assert problem(forged, signers=signers, identity="chips@example.org") is not None
    assert "not signed" in str(problem(content, signers=signers, identity="chips@example.org"))
    with pytest.raises(ConfigError, match="cannot be signed"):
        sign(content, tmp_path / "absent")


def test_only_reports_of_this_schema_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("{", "[]", '{"schema": "other/1"}'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            read(path)


def test_diff_tells_what_broke_first_and_what_grew(content: dict[str, Any]) -> None:
    new = json.loads(json.dumps(content))
    rows = {row["id"].rsplit("/", 1)[-1]: row for row in new["cases"]}
    rows["good"]["error"] = 5e-6
    rows["close"]["status"] = "crash"
    rows["bad"]["status"] = "pass"
    changes = compare(content, new)
    assert [(change.case.rsplit("/", 1)[-1], change.worse) for change in changes] == [
        ("close", True),
        ("good", False),
        ("bad", False),
    ]
    assert compare(content, json.loads(json.dumps(content))) == []


def test_known_failures_need_a_reason_and_expire(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text(
        '[[known]]\ncase = "ops/x/cpu:b/*"\nreason = "erratum 12"\nuntil = 2030-01-01\n'
        '[[known]]\ncase = "ops/y/*"\nreason = "typo"\n'
    )
    entries = read_known(path, today=datetime.date(2026, 1, 1))
    assert [entry.reason for entry in entries] == ["erratum 12", "typo"]
    assert len(read_known(path, today=datetime.date(2030, 1, 1))) == 1
    for bad in (
        '[[known]]\ncase = "a"\n',
        '[[known]]\ncase = "a"\nreason = "b"\nwhy = "c"\n',
        '[[known]]\ncase = "a"\nreason = "b"\nuntil = "soon"\n',
        "known = 3\n",
        "[other]\n",
        "[[known",
    ):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="known failures"):
            read_known(path, today=datetime.date(2026, 1, 1))


def test_a_known_failure_that_passes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    names = ("a/fails", "b/*", "c/typo", "d/*", "e/half/*")
    path.write_text("".join(f'[[known]]\ncase = "{name}"\nreason = "r"\n' for name in names))
    statuses = {"a/fails": "known", "b/1": "pass", "b/2": "not_declared", "d/1": "pass", "e/half/1": "pass",
                "e/half/2": "known"}  # fmt: skip
    rows = told(read_known(path, today=datetime.date(2026, 1, 1)), statuses, [*statuses, "d/2"])
    assert [row["state"] for row in rows] == ["used", "passes", "no case", "not asked", "used"]
    assert (rows[4]["failed"], rows[4]["cases"]) == (1, 2)
    assert advice(rows[1]) == "known failure 'b/*' is none: none of its 2 case(s) fails; take it out"
    assert "about no case" in advice(rows[2])


def test_a_stale_known_failure_fails_the_report() -> None:
    target = open_target("cpu")
    good = (Case(id="a", level=2, subject="s", run="x:y"), Outcome(status="pass"))
    entry = {"case": "a", "reason": "r", "issue": "", "state": "passes", "cases": 1, "failed": 0}
    for state, verdict in (("passes", "fail"), ("no case", "fail"), ("not asked", "pass"), ("used", "pass")):
        content = build(target, [good], levels=[2], quick=False, known=[{**entry, "state": state}])
        assert content["verdict"] == verdict
        assert f">{state}</span>" in page(content)


def test_the_command_notices_a_known_failure_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "known.toml").write_text('[[known]]\ncase = "plugin/cpu/failures"\nreason = "mended"\n')
    words = ["conformance", "cpu", "--level", "0", "-k", "plugin/cpu/failures", "--known", "known.toml"]
    assert main([*words, "--json", "r.json"]) == 1
    assert "known failure 'plugin/cpu/failures' is none" in capsys.readouterr().out
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["verdict"] == "fail" and [row["status"] for row in content["cases"]] == ["pass"]


def test_the_page_escapes_what_plugins_say(content: dict[str, Any]) -> None:
    text = page(content)
    assert "&lt;b&gt;wrong&lt;/b&gt;" in text
    assert "<script" not in text
    assert "nan / 1e-05" in text
