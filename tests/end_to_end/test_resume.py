"""A killed run that is resumed gives the metrics and weights of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_mixtures import write_echo_recipe, write_tiny_mixture

TIMES = ("time/", "throughput/", "memory/")


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo_core.cli.main", "train", *arguments], capture_output=True, text=True
    )


def rows(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines]


def weights(run: Path) -> bytes:
    return (sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors").read_bytes()


# A tracker cannot stop the clock where a phase is, so the child kills itself from inside the phase.
KILLER = """
import functools, os, signal, sys
from grpo_core import loop
from grpo_core.train import trainer
from grpo_core import checkpoint
phase, recipe, *settings = sys.argv[1:]
calls = 0

def die(original, at):
    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return wrapped

if phase == "rollout":
    loop.score = die(loop.score, 3)
elif phase == "training":
    trainer.NativeTrainer.step = die(trainer.NativeTrainer.step, 3)
else:
    checkpoint._flush = die(checkpoint._flush, 3)
from grpo_core.cli.main import main
sys.exit(main(["train", recipe, *settings]))
"""


@pytest.mark.parametrize("phase", ["rollout", "training", "saving"])
def test_sigkill_then_resume_equals_the_unbroken_run(phase: str, tiny_recipe: Path, tmp_path: Path) -> None:
    unbroken = train(str(tiny_recipe), f"run.dir={tmp_path}/unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, phase, str(tiny_recipe)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train("--resume", str(tmp_path / "run"))
    assert resumed.returncode == 0, resumed.stderr
    assert any(row["policy/grad_norm"] > 0 for row in rows(tmp_path / "unbroken")), "nothing was learned"
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("deepseek_v3", ("train.dtype=float32", "train.routing_replay=R3")),
        ("qwen3_next", ("train.dtype=bfloat16", "train.routing_replay=R2", "algo.mini_batches=2")),
    ],
)
def test_a_mixture_of_experts_resumes_as_a_dense_model_does(
    family: str, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    recipe = write_echo_recipe(tmp_path, write_tiny_mixture(tmp_path / "model", family))
    settings = (*settings, "run.save_every=1")
    unbroken = train(str(recipe), f"run.dir={tmp_path}/unbroken", *settings)
    assert unbroken.returncode == 0, unbroken.stderr
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, "training", str(recipe), *settings], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < len(rows(tmp_path / "run")) < 4
    resumed = train("--resume", str(tmp_path / "run"))
    assert resumed.returncode == 0, resumed.stderr
    assert all(row["policy/grad_norm"] > 0 for row in rows(tmp_path / "unbroken"))
    assert all("mismatch/routing_free_changed" in row for row in rows(tmp_path / "unbroken"))
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


def test_sigkill_from_outside_at_any_moment(tiny_recipe: Path, tmp_path: Path) -> None:
    unbroken = train(str(tiny_recipe), f"run.dir={tmp_path}/unbroken", "train.steps=12")
    assert unbroken.returncode == 0, unbroken.stderr
    child = subprocess.Popen(
        [sys.executable, "-m", "grpo_core.cli.main", "train", str(tiny_recipe), "train.steps=12"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while child.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.005)
    assert child.poll() is None, "the run ended before it could be killed"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    resumed = train("--resume", str(tmp_path / "run"))
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


def test_checkpoint_loads_in_transformers(tiny_recipe: Path, tmp_path: Path) -> None:
    done = train(str(tiny_recipe))
    assert done.returncode == 0, done.stderr
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("3+4=", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


LIMITED = """
import resource, sys
from grpo_core.cli.main import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(["train", *sys.argv[2:]]))
"""


def test_disk_that_takes_no_more_while_saving(tiny_recipe: Path, tmp_path: Path) -> None:
    done = train(str(tiny_recipe), "train.steps=1")
    assert done.returncode == 0, done.stderr
    refused = subprocess.run(
        [sys.executable, "-c", LIMITED, "60000", str(tiny_recipe), f"run.dir={tmp_path}/full"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    error = refused.stderr[refused.stderr.index("error: ") :].splitlines()
    assert "step 1 could not be written" in error[0] and error[1].startswith("  why: "), error
    assert len(rows(tmp_path / "full")) == 1, "the metrics of the finished step are lost"
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []
    resumed = train("--resume", str(tmp_path / "full"), "train.steps=1")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "full") == rows(tmp_path / "run")
