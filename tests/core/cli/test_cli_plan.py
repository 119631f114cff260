"""`grpo plan` on a model folder that holds a config.json and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_core.cli.main import main
from grpo_core.plan import load_plan

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 100, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN2))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {model}\ndevice: cpu\ndata:\n  train: {tmp_path}/none.jsonl\nrewards:\n  - name: exact\n"
        "train:\n  dtype: float32\n"
    )
    return path


def show(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_table_names_every_op_and_who_serves_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = show(capsys, recipe)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "." in line.split("  ")[0][:20]}
    assert rows["engine.train"][1] == "core:native" and rows["loss.logprob"][1].count(":") == 1
    assert "qwen2_5, 2 layers" in out and "train float32, rollout float32" in out and "0 fallback(s)" in out


def test_planning_imports_no_torch(recipe: Path) -> None:
    code = (
        f"import sys; from grpo_core.cli.main import main; c = main(['plan', {str(recipe)!r}, '--why'])\n"
        + ("print(c, 'torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)")
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr.splitlines()[-1] == "0 False False"


def test_why_shows_what_was_asked_and_who_was_passed_over(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = show(capsys, recipe, "--why", "ops.norm.rms=core:reference")
    assert "hidden_size=64, zero_centered=False" in out
    assert "num_key_value_groups=2" in out and " asked " in out


def test_json_is_a_plan_that_can_be_replayed_and_compared(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(show(capsys, recipe, "--json", "ops.mlp.swiglu=core:reference"))
    plan = load_plan(path)
    assert plan.choice("mlp.swiglu").pinned
    replayed = tmp_path / "again.json"
    replayed.write_text(show(capsys, recipe, "--json", "--plan", path))
    assert load_plan(replayed).id == plan.id
    assert f"no differences to plan {plan.id}" in show(capsys, recipe, "--plan", path, "--against", path)


def test_against_shows_what_differs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(show(capsys, recipe, "--json"))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    edited = load_plan(path)
    other = edited.to_json()
    other["device"]["name"] = "another machine"
    path.write_text(json.dumps(other))
    out = show(capsys, recipe, "--against", path)
    assert any(line.startswith("device") and "another machine" in line for line in out.splitlines())


def test_config_shows_each_setting_with_its_source(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = show(capsys, recipe, "--json", "--config", "train.lr=1e-3", "ops.norm.rms=core:reference")
    rows = json.loads(text)["config"]
    assert rows["train.lr"] == {"value": 1e-3, "source": "command line"}
    assert rows["train.dtype"] == {"value": "float32", "source": "run.yaml:8"}
    assert rows["train.steps"]["source"] == "default"
    assert rows["rewards.0.name"]["value"] == "exact"
    assert rows["ops.norm.rms"] == {"value": "core:reference", "source": "command line"}
    table = show(capsys, recipe, "--config")
    assert any(line.split() == ["train.dtype", '"float32"', "run.yaml:8"] for line in table.splitlines())


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["plan", *map(str, words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if not line.startswith("warning")][-3:]


def test_a_family_that_nobody_serves_lists_the_served_ones(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**QWEN2, "architectures": ["MambaForCausalLM"]})
    )
    what, why, fix = fails(capsys, recipe)
    assert what == "error: no model plugin serves MambaForCausalLM"
    assert "LlamaForCausalLM" in why and "Qwen2ForCausalLM" in why and fix.startswith("  fix: ")


def test_a_pin_that_cannot_serve_lists_the_alternatives(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what, why, fix = fails(capsys, recipe, "ops.mlp.swiglu=core:referense")
    assert what == "error: ops.mlp.swiglu is pinned to core:referense, which cannot serve it"
    assert "did you mean 'core:reference'" in why and "core:reference" in fix


def test_an_absent_device_lists_what_was_found(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what, why, _ = fails(capsys, recipe, "device=warp9")
    assert what == "error: there is no device 'warp9'" and "cpu" in why


def test_a_plugin_that_is_off_is_gone(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(show(capsys, recipe, "--json", "plugins_off=[cpu]"))
    assert {row["chosen"] for row in plan["choices"]} == {"core:reference", "core:native", None}
    assert "cpu" not in [row["id"] for row in plan["plugins"]]


def test_a_missing_plan_is_three_lines(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what, _, _ = fails(capsys, recipe, "--plan", tmp_path / "absent.json")
    assert what.startswith("error: cannot read ")


def test_a_consistent_plan_tells_why_fast_offers_were_passed_over(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = show(capsys, recipe, "consistent=true", "--why")
    assert "mode    consistent" in out
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith("attention.")}
    assert rows["attention.varlen"] == rows["attention.decode"] == "cpu:consistent"
    assert rows["attention.cache"] == "core:reference" and rows["attention.step"] == "-"
    refused = [line for line in out.splitlines() if "does not offer batch_invariant" in line]
    assert sum("x cpu:torch" in line for line in refused) >= 5
    assert "mode " not in show(capsys, recipe)


def test_a_pin_that_is_not_batch_invariant_is_refused_in_consistent_mode(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["consistent=true", "ops.attention.varlen=cpu:torch"]
    assert main(["plan", str(recipe), *overrides]) == 2
    assert "does not offer batch_invariant" in capsys.readouterr().err
