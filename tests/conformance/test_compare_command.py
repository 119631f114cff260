"""`grpo compare`: one configuration on several devices, in processes of their own, in one report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from grpo_conformance import compare as command
from grpo_core.errors import ConfigError
from grpo_core.report.read import read_runs


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(words)


def test_a_device_can_be_run_by_another_command() -> None:
    found = command.commands_of(["ascend=env A=b python -m tool"], ["cpu", "ascend"])
    assert found == {"ascend": ("env", "A=b", "python", "-m", "tool")}


@pytest.mark.parametrize("given", ["sim=x", "cpu=", "cpu"])
def test_a_command_for_no_device_is_an_error(given: str) -> None:
    with pytest.raises(ConfigError, match="says not how"):
        command.commands_of([given], ["cpu", "ascend"])


def test_one_device_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two devices or more"):
        command.run(parse("--devices", "cpu,cpu", "-o", str(tmp_path / "out")))


def test_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tiny model of the kind 'huge'"):
        command.run(parse("--devices", "cpu,sim", "--kind", "huge", "-o", str(tmp_path / "out")))


def test_a_run_that_fails_shows_what_it_said(tmp_path: Path) -> None:
    job = command.Job(label="cpu", device="cpu", overrides=())
    words = (sys.executable, "-c", "raise SystemExit('no such chip')")
    with pytest.raises(ConfigError, match="ended with code 1") as caught:
        command.train(job, ["x.yaml"], words, tmp_path)
    assert "no such chip" in caught.value.why


@pytest.mark.slow
def test_cpu_and_sim_in_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--devices", "cpu,sim", "-o", str(out), "--twins", "1"]
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert command.run(parser.parse_args(words)) == 0
    said = capsys.readouterr().out
    assert "within the band" in said
    cpu, sim, twin = read_runs([out / "cpu", out / "sim", out / "twin-1"])
    assert cpu.plan["device"]["type"] == "cpu"
    assert sim.plan["device"]["type"] == "sim"
    assert len(cpu.rows) == len(sim.rows) == command.TINY_STEPS
    # The twin's weights did change, and every completion was kept.
    assert twin.rows[0]["policy/entropy"] != cpu.rows[0]["policy/entropy"]
    assert len(cpu.completions(1)) == 64
    assert 'class="verdict good"' in (out / "report.html").read_text()
    with pytest.raises(ConfigError, match="exists"):
        command.run(parser.parse_args(words))


def test_the_first_device_decides_the_dtype(tmp_path: Path) -> None:
    args = parse("--devices", "cpu,sim", "-o", str(tmp_path))
    file = Path(command._tiny(args))
    tree = json.loads(file.read_text())
    tree["train"]["dtype"] = "auto"
    file.write_text(json.dumps(tree))
    jobs = command.jobs_of([str(file), "rollout.prompts=4"], ["cpu", "sim"], tmp_path, 1)
    assert [(job.label, job.device) for job in jobs] == [("cpu", "cpu"), ("sim", "sim"), ("twin-1", "cpu")]
    for job in jobs:
        assert any(word in job.overrides for word in ("train.dtype=float32", "train.dtype=bfloat16"))
        assert "run.log_samples=32" in job.overrides
    assert any(word.startswith("model=") for word in jobs[-1].overrides)
