"""A tiny model with a character tokenizer and a config that trains it in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import write_additions, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2 checkpoint."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A config file that trains the tiny model for four steps."""
    data = write_additions(tmp_path / "additions.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""model: {tiny_model}
device: cpu
data:
  train: {data}
  options: {{plain: true}}
rewards:
  - name: regex
    options: {{pattern: "[0-9]"}}
  - name: exact
algo:
  group_size: 4
rollout:
  prompts: 4
  max_tokens: 6
train:
  steps: 4
  lr: 1e-3
  dtype: float32
run:
  dir: {tmp_path}/run
  save_every: 1
  threads: 1
"""
    )
    return path
