"""Every recipe is a valid configuration, and the quickstart runs as the README starts it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_core.config_loader import load_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
METRICS_PAGE = (ROOT / "docs" / "algorithm.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_valid_and_warns_of_nothing(recipe: Path) -> None:
    assert list(load_config(recipe).warnings) == []


def test_the_quickstart_may_be_run_twice() -> None:
    """A fixed run folder would be refused the second time."""
    assert "{time}" in load_config(ROOT / "recipes" / "quickstart.yaml").config.run.dir


def test_the_quickstart_asks_for_sums_that_the_reward_can_check() -> None:
    from grpo_core.data.datasets import open_dataset
    from grpo_core.data.rewards import number
    from grpo_core.plugins import load

    config = load_config(ROOT / "recipes" / "quickstart.yaml").config
    samples = open_dataset(config.data.train, config.data, load().registry, "train")
    for sample in [samples[index] for index in range(50)]:
        question = sample.messages[-1]["content"]
        terms = re.fullmatch(r"Calculate (\d|10) \+ (\d|10)\. Reply with the number only\.", question)
        assert terms, question
        total = int(terms[1]) + int(terms[2])
        assert number(f"{terms[1]} + {terms[2]} = {total}", sample) == 1.0
        assert number(f"{total + 1}", sample) == 0.0


def documented(name: str) -> bool:
    """Whether the page on the algorithm explains a metric; `<name>` there stands for anything."""
    for cell in re.findall(r"^\| (`.*?) \|", METRICS_PAGE, flags=re.MULTILINE):
        for written in re.findall(r"`([^`]+)`", cell):
            if re.fullmatch(re.sub(r"<\w+>", r"[^/]+", written), name):
                return True
    return False


@pytest.mark.slow
def test_the_quickstart_trains(tmp_path: Path) -> None:
    """Two short steps of the real model: a reward within its range, an update, a checkpoint, a report."""
    run = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, "-m", "grpo_core.cli.main", "train", str(ROOT / "recipes" / "quickstart.yaml"),
            "train.steps=2", "rollout.prompts=4", "algo.group_size=4", "eval.every=2", "eval.samples=8",
            f"run.dir={run}",
        ],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in steps] == [1, 2]
    # The untrained model is right in 0.2 to 0.3 of the samples, so 16 all right or all wrong would be odd,
    # but the sum over both steps must lie strictly between.
    assert 0 < sum(row["reward/mean"] for row in steps) < 2
    assert all(row["policy/grad_norm"] > 0 for row in steps)
    # bfloat16 on both sides: two correct engines differ by a few hundredths per token, never by this much.
    assert all(row["mismatch/logprob_gap_mean"] < 0.15 for row in steps)
    greedy = [row["eval/basic_arithmetic/reward"] for row in rows if "eval/basic_arithmetic/reward" in row]
    assert greedy
    # Greedily it is right in 0.75 to 0.95; a broken chat template or tokenizer gives about 0.
    assert min(greedy) >= 0.4
    assert list((run / "checkpoints").glob("step-*/model.safetensors"))
    assert (run / "report.html").stat().st_size > 1000
    assert [name for row in rows for name in row if name != "step" and not documented(name)] == []


PUBLISHED = ROOT / "tests" / "plugins" / "models" / "published"
REAL = {
    "moonlight-16b-a3b.yaml": ("Moonlight-16B-A3B-Instruct", "deepseek_v3", 2e-6),
    "deepseek-v3.yaml": ("DeepSeek-V3-0324", "deepseek_v3", 7e-7),
    "qwen3-next-80b-a3b.yaml": ("Qwen3-Next-80B-A3B-Instruct", "qwen3_next", 2e-6),
    "qwen2.5-7b.yaml": ("Qwen2.5-7B", "qwen2_5", 1e-6),
}


@pytest.mark.parametrize("recipe", REAL)
def test_a_recipe_of_a_real_model_leaves_the_familys_settings_alone(recipe: str, tmp_path: Path) -> None:
    """Planned from the published config.json: the family serves it, and its advice is what the run gets."""
    from grpo_core.planning import plan_run

    name, family, lr = REAL[recipe]
    written = load_config(ROOT / "recipes" / recipe)
    assert written.config.model.rpartition("/")[2].removesuffix("-Instruct") == name.removesuffix("-Instruct")
    (tmp_path / "config.json").write_text((PUBLISHED / f"{name}.json").read_text())
    planned = plan_run(
        load_config(ROOT / "recipes" / recipe, [f"model={tmp_path}", "device=cpu"]), weights=False
    )
    assert planned.family.name == family
    train = planned.config.train
    advice = planned.family.recipe(planned.arch, planned.info, 1)
    assert train.lr == lr == advice["train.lr"].value
    if family != "qwen2_5":
        assert train.routing_replay == "R3"
        assert train.router_dtype == advice["train.router_dtype"].value
        assert planned.config.algo.mini_batches * planned.config.algo.epochs == 1
    assert planned.loaded.warnings == ()
