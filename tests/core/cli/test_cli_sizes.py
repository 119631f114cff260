"""`grpo plan` tells a model's size from a config.json alone, and each setting's source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_core.cli.main import main
from grpo_core.cli.plan import fixed_rules
from grpo_core.cli.sizes import human
from grpo_core.model.hf_config import read_hf_config
from grpo_core.plugins import load as catalogue

PUBLISHED = Path(__file__).parents[2] / "plugins" / "models" / "published"


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    folder = tmp_path / "DeepSeek-V3-0324"
    folder.mkdir()
    shutil.copy(PUBLISHED / "DeepSeek-V3-0324.json", folder / "config.json")
    return folder


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    folder = tmp_path / "next"
    folder.mkdir()
    shutil.copy(PUBLISHED / "Qwen3-Next-80B-A3B-Instruct.json", folder / "config.json")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {folder}\ndevice: cpu\ndata:\n  train: {tmp_path}/none.jsonl\nrewards:\n  - name: exact\n"
        "train:\n  lr: 3e-6\nfallback: reference\n"
    )
    return path


def show(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def sized(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    size: dict[str, Any] = json.loads(show(capsys, *words, "--json"))["size"]
    return size


def test_a_folder_with_a_config_alone_is_enough(deepseek: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = show(capsys, deepseek, "--dp", 8, "--tp", 4, "--pp", 16, "--ep", 32)
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["256 experts"][2:] == ["58", "11,274,289,152", "653,908,770,816", "20,434,649,088"]
    assert rows["all"] == ["all", "671,026,419,200", "37,552,297,472"]
    assert rows["KV cache of a token"][5:] == ["70.27", "kB", "4.608", "kB"]
    assert "one of 512 rank(s) (dp8 x tp4 x pp16 x ep32" in out


def test_json_has_every_number(deepseek: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sized(capsys, deepseek)
    assert size["parameters"] == {"total": 671026419200, "active": 37552297472, "mtp": 11610068224}
    assert sum(row["total"] for row in size["items"]) == 671026419200
    assert size["model"]["training"] == sum(
        size["model"][key] for key in ("weights", "gradients", "optimizer")
    )
    assert {**size["rank"], "stage": 0} == {"stage": 0, **size["model"]}
    spread = sized(capsys, deepseek, "--dp", 256, "--ep", 256, "--distributed-optimizer")
    assert spread["layout"]["world"] == 256 and spread["layout"]["distributed_optimizer"]
    assert spread["rank"]["optimizer"] < size["model"]["optimizer"] / 200


def test_it_takes_a_moment_and_no_torch(deepseek: Path) -> None:
    code = (
        "import sys, time; from grpo_core.cli.main import main\n"
        f"start = time.process_time(); main(['plan', {str(deepseek)!r}])\n"
        "print(time.process_time() - start, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch_loaded = done.stderr.split()[-2:]
    assert float(seconds) < 5 and torch_loaded == "False"


def test_a_layout_that_does_not_fit_is_three_lines(
    deepseek: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(deepseek), "--tp", "3"]) == 2
    what, why, fix = capsys.readouterr().err.splitlines()[-3:]
    assert what == "error: this layout does not divide the model"
    assert "does not divide 128 attention heads" in why and fix.startswith("  fix: ")


def test_every_setting_has_its_source(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (run_file, "--config", "algo.epochs=2")
    rows = json.loads(show(capsys, *words, "--json"))["config"]
    assert rows["train.lr"] == {"value": 3e-6, "source": "run.yaml:8"}
    assert rows["algo.epochs"] == {"value": 2, "source": "command line"}
    assert rows["train.steps"]["source"] == "default"
    router = rows["train.router_dtype"]
    assert router["value"] == "float64"
    assert router["source"].startswith("recipe of qwen3_next: 512 experts")
    assert rows["algo.mini_batches"]["source"].startswith("recipe of qwen3_next: off-policy")
    assert rows["train.mtp"]["value"] == "off"
    table = show(capsys, *words)
    assert any(line.startswith("train.router_dtype") and "recipe of qwen3_next" in line
               for line in table.splitlines())  # fmt: skip
    assert "79,674,391,296" in table and "fixed: no balancing loss is added" in table


def test_what_has_no_setting_is_told(deepseek: Path) -> None:
    family = catalogue().model_plugin_for(["DeepseekV3ForCausalLM"])
    told = " ".join(fixed_rules(family.arch(read_hf_config(deepseek))))
    for piece in ("no balancing loss", "selection biases", "float8 weights are dequantised"):
        assert piece in told


def test_bytes_are_spelled_in_decimal_units() -> None:
    assert [human(count) for count in (0, 999, 1000, 70272, 1342052838400)] == [
        "0 B", "999 B", "1 kB", "70.27 kB", "1.342 TB",
    ]  # fmt: skip
