"""metrics.jsonl, TensorBoard, W&B."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_core.config import Config
from grpo_core.config_loader import parse_config
from grpo_core.errors import ConfigError
from grpo_core.registry import Registry
from grpo_core.rundir import drop_after
from grpo_core.trackers import open_trackers


def config(*trackers: str) -> Config:
    text = "model: m\ndata: {train: a.jsonl}\nrewards: [{name: exact}]\n"
    return parse_config(text, "run.yaml", [f"run.trackers=[{', '.join(trackers)}]"]).config


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_on_the_disk_when_log_returns(tmp_path: Path) -> None:
    (tracker,) = open_trackers(config(), tmp_path, Registry())
    tracker.log(1, {"reward/mean": 0.5, "length/max": 7})
    assert rows(tmp_path) == [{"step": 1, "reward/mean": 0.5, "length/max": 7}]
    tracker.log(2, {"policy/loss": math.nan, "policy/kl": -math.inf})
    tracker.close()
    assert rows(tmp_path)[1] == {"step": 2, "policy/loss": None, "policy/kl": None}


def test_a_resumed_run_appends_after_the_rows_that_count(tmp_path: Path) -> None:
    (first,) = open_trackers(config(), tmp_path, Registry())
    for step in range(1, 6):
        first.log(step, {"x": step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x": ')
    drop_after(tmp_path, 3)
    (second,) = open_trackers(config(), tmp_path, Registry(), first_step=3)
    second.log(4, {"x": 40})
    second.close()
    assert [(row["step"], row["x"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(config("tensorboard"), tmp_path, Registry())
    for step in (1, 2):
        for tracker in trackers:
            tracker.log(step, {"reward/mean": step / 4})
    for tracker in trackers:
        tracker.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


class FakeWandb:
    """The calls that the tracker makes of wandb."""

    def __init__(self, key: str | None) -> None:
        self.api = SimpleNamespace(api_key=key)
        self.started: dict[str, object] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False
        self.__spec__ = SimpleNamespace(name="wandb")

    def init(self, **settings: object) -> FakeWandb:
        self.started = settings
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize(("key", "mode"), [(None, "offline"), ("", "offline"), ("secret", None)])
def test_wandb_is_offline_unless_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, mode: str | None
) -> None:
    fake = FakeWandb(key)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers = open_trackers(config("wandb"), tmp_path, Registry())
    for tracker in trackers:
        tracker.log(3, {"reward/mean": 0.5})
        tracker.close()
    assert fake.started["mode"] == mode
    assert fake.started["dir"] == str(tmp_path)
    assert "secret" not in str(fake.started)
    assert fake.logged == [(3, {"reward/mean": 0.5})]
    assert fake.finished


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_told_with_the_line_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        open_trackers(config(name), tmp_path, Registry())
    assert f'pip install "grpo-core[{name}]"' in caught.value.fix
    assert len(str(caught.value).splitlines()) == 3


def test_registered_trackers(tmp_path: Path) -> None:
    seen: list[object] = []

    class Mine:
        def __init__(self, run_dir: Path, settings: Config) -> None:
            seen.extend([run_dir, settings.model])

        def log(self, step: int, values: Mapping[str, float]) -> None:
            seen.append((step, dict(values)))

        def close(self) -> None:
            seen.append("closed")

    registry = Registry()
    registry.tracker("mine", Mine)
    for tracker in open_trackers(config("mine"), tmp_path, registry):
        tracker.log(1, {"x": 1.0})
        tracker.close()
    assert seen == [tmp_path, "m", (1, {"x": 1.0}), "closed"]
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        open_trackers(config("mime"), tmp_path, registry)


def test_resuming_keeps_samples_that_hold_a_line_separator(tmp_path: Path) -> None:
    rows_before = [{"step": step, "completion": "a\u2028b\x85c"} for step in (1, 2)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_before)
    (tmp_path / "samples.jsonl").write_text(text, encoding="utf-8")
    drop_after(tmp_path, 1)
    kept = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in kept.split("\n") if line] == rows_before[:1]
