"""The examples of docs/getting-started.md work."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from grpo_core.config import RewardConfig
from grpo_core.data.reward_runner import RewardRunner
from grpo_core.plugins import load
from grpo_core.types import Sample

PAGE = (Path(__file__).parents[2] / "docs" / "getting-started.md").read_text()


def block(kind: str) -> str:
    (text,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(text)


def test_a_reward_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the console script, whose sys.path lacks the working folder."""
    (tmp_path / "my_rewards.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    configs = [RewardConfig.model_validate(entry) for entry in yaml.safe_load(block("yaml"))["rewards"]]
    sample = Sample(id="a", answer="14")
    with RewardRunner(configs, load().registry, workers=1) as rewards:
        short, long = rewards.score([("It is 14", sample), ("14" + " " * 150, sample)])
    assert short == {"my_rewards:short_and_right": 1.0, "number": 1.0}
    assert long["my_rewards:short_and_right"] == pytest.approx(1 - 0.001 * (152 - 100))
