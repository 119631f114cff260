"""The report page: complete, self-contained, safe whatever a model wrote."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo_core.cli import report as command
from grpo_core.errors import ConfigError
from grpo_core.report.html import write_report
from grpo_core.report.read import read_runs

VOID = {"meta", "br", "img", "link", "input"}
EVIL = [
    "<script>alert(1)</script>",
    "</pre></td></table></main><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "<!-- --> <style>*{display:none}</style> &lt;b&gt;",
    "\x00\x1b[31m\u202eevil\u2066\ud800",
]


class Page(HTMLParser):
    """Tags in order; complains about any that does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def titles(self) -> list[str]:
        """Titles of the charts."""
        return [attrs["aria-label"] or "" for tag, attrs in self.tags if tag == "svg"]


def make_run(folder: Path, steps: int = 30, *, evil: str = "") -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "reward/mean": step / steps,
                "reward/std": 0.2,
                "reward/exact/mean": step / steps,
                "length/mean": 30.0,
                "length/clipped": 0.1,
                "policy/entropy": 1.0,
                "policy/clip_fraction": 0.02,
                "policy/grad_norm": None if step == 3 else 0.5,
                "policy/kl": 0.001,
                "mismatch/logprob_gap_mean": 0.004,
                "mismatch/logprob_gap_max": 0.1,
                "time/rollout": 1.0,
                "time/reward": 0.1,
                "time/train": 0.8,
                "time/step": 2.0,
                "throughput/rollout_tokens_per_s": 3100.0,
                "throughput/train_tokens_per_s": 5200.0,
                "memory/peak_gb": 1.5,
            }
            file.write(json.dumps(row) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, f"eval/sums{evil}/reward": 0.5}) + "\n")
    with (folder / "samples.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "prompt": f"prompt {step} {evil}",
                "completion": f"completion {step} {evil}",
                "answer": f"4{evil}",
                "reward": 1.5,
                "rewards": {f"exact{evil}": 1.0, "format": 0.5},
                "advantage": -0.5,
                "finish_reason": "length",
            }
            file.write(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text(json.dumps({"model": f"some/model{evil}", "train": {"steps": 40}}))
    choice = {"op": f"attention.varlen{evil}", "chosen": f"cpu:onednn{evil}", "reason": f"highest rank{evil}"}
    plan = {"id": "ab12cd34", "device": {"type": "cpu", "name": f"Chip{evil}"}, "choices": [choice]}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "environment.json").write_text(json.dumps({"packages": {f"torch{evil}": "2.6"}}))
    return folder


def test_a_report_shows_the_plots_and_tables(tmp_path: Path) -> None:
    out = write_report([make_run(tmp_path / "run")], tmp_path / "deep" / "report.html")
    page = Page(out.read_text())
    assert page.titles() == [
        "Reward",
        "Evaluation: sums",
        "Completion length",
        "Cut at the token limit",
        "Entropy",
        "Clip fraction",
        "Gradient norm",
        "Rollout-trainer log-prob gap",
        "Largest log-prob gap",
        "KL to the reference",
        "Throughput",
        "Memory",
        "Time split of run",
    ]
    shown = " ".join(page.texts)
    for text in (
        "some/model",
        "Chip",
        "ab12cd34",
        "cpu:onednn",
        "highest rank",
        "3100",
        "+0.900 since start",
    ):
        assert text in shown
    for step in (1, 2, 29, 30):
        assert f"completion {step} " in shown
    assert "completion 15 " not in shown


def test_nothing_is_loaded_from_outside_and_no_script_runs(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run")], tmp_path / "r.html").read_text())
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "use",
        "image",
    } == set()
    for _, attrs in page.tags:
        assert not {name for name in attrs if name.startswith("on") or name in ("src", "href", "style")}
    assert "url(" not in (tmp_path / "r.html").read_text()
    assert "@import" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_text_stays_text(tmp_path: Path, evil: str) -> None:
    plain = Page(write_report([make_run(tmp_path / "plain" / "run")], tmp_path / "p.html").read_text())
    page = Page(
        write_report([make_run(tmp_path / "evil" / "run", evil=evil)], tmp_path / "e.html").read_text()
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attrs) for _, attrs in page.tags] == [sorted(attrs) for _, attrs in plain.tags]
    text = (tmp_path / "e.html").read_bytes()
    assert not any(byte in text for byte in (b"\x00", b"\x1b", "\u202e".encode()))


def test_hostile_text_can_be_read_as_it_was_written(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", evil=EVIL[1])], tmp_path / "e.html").read_text())
    assert f"completion 1 {EVIL[1]}" in page.texts


def test_two_runs_lie_over_each_other_with_a_legend(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", steps=12)]
    page = Page(write_report(runs, tmp_path / "r.html").read_text())
    assert page.titles().count("Reward") == 1
    assert [title for title in page.titles() if title.startswith("Time split")] == [
        "Time split of run (1)",
        "Time split of run (2)",
    ]
    assert page.texts.count("run (1)") >= page.titles().count("Reward")
    curves = [attrs for tag, attrs in page.tags if tag == "path" and "curve" in (attrs["class"] or "")]
    # 11 metrics with one curve and throughput with two, for each run; and the distance of the second.
    assert len(curves) == 2 * 13 + 1


def test_a_run_that_has_just_started(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "No step was finished yet" in write_report([tmp_path / "run"], tmp_path / "r.html").read_text()


def test_one_step_and_a_line_cut_in_two(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 2, "reward/me')
    page = Page(write_report([run], tmp_path / "r.html").read_text())
    assert "Reward" in page.titles()


def test_damaged_side_files_do_not_stop_the_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    (run / "plan.json").write_text("[1, 2")
    (run / "environment.json").write_text("[]")
    (run / "config.yaml").unlink()
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"step": 3, "reward": "x", "rewards": [1], "advantage": null}\n[]\n')
    assert "Reward" in Page(write_report([run], tmp_path / "r.html").read_text()).titles()


def test_a_later_row_of_a_step_wins(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "x": 1}\n{"step": 1, "x": 3}\n{"step": 2, "x": 2, "y": null}\n'
    )
    (run,) = read_runs([tmp_path])
    assert run.points("x") == [(1, 3.0), (2, 2.0)]
    assert run.points("y") == [(2, None)]


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no metrics"):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_long_texts_are_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, evil="x" * 100_000)
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "more characters)" in page
    assert len(page) < 200_000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert command.run(parser.parse_args([str(runs[0])])) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")
    assert command.run(parser.parse_args([*map(str, runs), "-o", str(tmp_path / "both.html")])) == 0
    assert "a and b" in (tmp_path / "both.html").read_text()
    twin = make_run(tmp_path / "twin")
    words = [*map(str, runs), "--twin", str(twin), "-o", str(tmp_path / "judged.html")]
    assert command.run(parser.parse_args(words)) == 0
    assert "Distance from a" in (tmp_path / "judged.html").read_text()
