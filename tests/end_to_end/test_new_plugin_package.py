"""What `grpo new-plugin` writes builds, installs, is found, passes its own tests, and serves a model."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from built_wheels import PIP, ROOT, run, wheel_of
from tiny_run import write_additions, write_tiny_model


def grpo(*words: str | Path, cwd: Path, site: Path | None = None) -> str:
    """The output of a command that must succeed."""
    done = run(sys.executable, "-m", "grpo_core.cli.main", *words, cwd=cwd, site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written package."""
    folder = tmp_path_factory.mktemp("new")
    grpo("new-plugin", "model", "tiny-llm", cwd=folder)
    return folder / "grpo-tiny-llm"


@pytest.fixture(scope="module")
def site(package: Path) -> Path:
    """A folder with the package installed from its wheel."""
    wheel, place = wheel_of(package, package.parent / "dist"), package.parent / "site"
    done = run(
        sys.executable,
        *PIP,
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        place,
        wheel,
        cwd=package.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "grpo_tiny_llm" / "plugin.py").is_file()
    return place


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that names the new architecture, in Llama's layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("run")
    model = write_tiny_model(folder / "model")
    config = json.loads((model / "config.json").read_text())
    kept = {key: config[key] for key in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")}
    (model / "config.json").unlink()
    LlamaForCausalLM(
        LlamaConfig(
            **kept, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    ).save_pretrained(model)  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["TinyLlmForCausalLM"], "model_type": "tiny-llm"}
    (model / "config.json").write_text(json.dumps(config))
    path = folder / "run.yaml"
    path.write_text(
        f"""model: {model}
device: cpu
data:
  train: {write_additions(folder / "additions.jsonl")}
  options: {{plain: true}}
rewards: [{{name: exact}}]
algo: {{group_size: 2}}
rollout: {{prompts: 2, max_tokens: 4}}
train: {{steps: 1, dtype: float32}}
run: {{dir: {folder / "run"}, threads: 1}}
"""
    )
    return path


@pytest.mark.slow
def test_the_plugin_is_listed_once_it_is_installed(site: Path, package: Path) -> None:
    assert "tiny-llm" not in grpo("plugins", cwd=package.parent)
    shown = json.loads(grpo("plugins", "--json", cwd=package.parent, site=site))
    assert shown["failures"] == []
    (row,) = [row for row in shown["plugins"] if row["id"] == "tiny-llm"]
    assert (row["distribution"], row["brings"]) == ("grpo-tiny-llm", ["model:tiny-llm"])


@pytest.mark.slow
def test_its_own_tests_pass(site: Path, package: Path) -> None:
    done = run(sys.executable, "-P", "-m", "pytest", "-q", cwd=package, site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_its_tests_fail_when_the_family_is_wrong(site: Path, package: Path, tmp_path: Path) -> None:
    # Without -P the tests import the package that they stand in, not the installed one.
    wrong = tmp_path / "wrong"
    shutil.copytree(package, wrong)
    module = wrong / "grpo_tiny_llm" / "tiny_llm.py"
    module.write_text(module.read_text().replace("head_dim=head_dim)", "head_dim=4)"))
    done = run(sys.executable, "-m", "pytest", "-q", "-k", "plain and check_logits", cwd=wrong, site=site)
    assert done.returncode == 1 and "logits are off" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_model_of_its_architecture_is_planned_and_trained(site: Path, recipe: Path) -> None:
    said = run(sys.executable, "-m", "grpo_core.cli.main", "plan", recipe, cwd=recipe.parent)
    assert said.returncode == 2 and "TinyLlmForCausalLM" in said.stderr, "someone else serves it"
    assert "(tiny-llm, 2 layers)" in grpo("plan", recipe, cwd=recipe.parent, site=site)
    assert "step 1/1" in grpo("train", recipe, cwd=recipe.parent, site=site)
    (saved,) = (recipe.parent / "run" / "checkpoints").glob("step-*")
    config = json.loads(next(saved.rglob("config.json")).read_text())
    assert config["architectures"] == ["TinyLlmForCausalLM"]


@pytest.mark.slow
def test_the_wheel_of_this_project_is_whole(tmp_path: Path) -> None:
    wheel = wheel_of(ROOT, tmp_path / "dist")
    sources = [
        path.relative_to(parent)
        for parent in (
            ROOT / "core",
            ROOT / "plugins" / "cpu",
            ROOT / "plugins" / "models",
            ROOT / "plugins" / "cuda",
            ROOT / "plugins" / "ascend",
            ROOT / "conformance",
        )
        for path in sorted(parent.rglob("*"))
        if path.is_file() and not {"__pycache__", "reports"} & set(path.relative_to(parent).parts)
    ]
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    missing = [str(path) for path in sources if str(path) not in held]
    assert missing == []
    assert {"adamw.cpp", "pyproject.toml.tmpl", "model_case.py"} <= {Path(name).name for name in held}
    code = "import grpo_core as a, grpo_conformance as b; print(a.__file__, b.__file__)"
    said = run(sys.executable, "-c", code, cwd=tmp_path, site=tmp_path / "site")
    assert said.stdout.count(str(tmp_path / "site")) == 2, said.stderr
    grpo("new-plugin", "model", "from-a-wheel", cwd=tmp_path, site=tmp_path / "site")
    assert (tmp_path / "grpo-from-a-wheel" / "pyproject.toml").is_file()
