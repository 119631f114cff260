"""Every mistake a user can make ends in three lines and exit code 2, with nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_mixtures import write_tiny_mixture

from grpo_core.checkpoint import checkpoints
from grpo_core.cli.main import main

Run = Callable[..., str]


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line, expects exit code 2 and returns the three lines of the error."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        assert code == 2, err
        assert "Traceback" not in err
        error = err[err.index("error: ") :]
        lines = error.rstrip("\n").splitlines()
        assert lines[1].lstrip().startswith("why: ") and lines[-1].lstrip().startswith("fix: "), error
        return error

    return run


def test_unknown_key(failing: Run, tiny_recipe: Path) -> None:
    text = tiny_recipe.read_text().replace("group_size: 4", "group_sise: 4")
    tiny_recipe.write_text(text)
    line = text.splitlines().index("  group_sise: 4") + 1
    error = failing("train", tiny_recipe)
    assert f"run.yaml:{line}" in error and "did you mean" in error and "algo.group_size" in error


def test_unknown_override(failing: Run, tiny_recipe: Path) -> None:
    error = failing("train", tiny_recipe, "rollout.max_token=3")
    assert "rollout.max_token" in error and "rollout.max_tokens" in error


def test_duplicate_key(failing: Run, tiny_recipe: Path) -> None:
    tiny_recipe.write_text(tiny_recipe.read_text() + "device: cpu\n")
    assert "device" in failing("train", tiny_recipe)


def test_wrong_type(failing: Run, tiny_recipe: Path) -> None:
    assert "train.lr" in failing("train", tiny_recipe, "train.lr=fast")


def test_several_errors_at_once(failing: Run, tiny_recipe: Path) -> None:
    error = failing("train", tiny_recipe, "train.lr=fast", "algo.kl_coef=-1")
    assert "train.lr" in error and "algo.kl_coef" in error


def test_group_of_one_with_std_normalisation(failing: Run, tiny_recipe: Path) -> None:
    assert "group_size" in failing("train", tiny_recipe, "algo.group_size=1")


def test_prompt_longer_than_the_limit(failing: Run, tiny_recipe: Path) -> None:
    assert "data.max_prompt_tokens" in failing("train", tiny_recipe, "data.max_prompt_tokens=3")


def test_empty_dataset(failing: Run, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    assert "empty" in failing("train", tiny_recipe, f"data.train={tmp_path}/none.jsonl")


REWARDS = """
import time

def raises(text, sample):
    raise KeyError("no such answer")

def nan(text, sample):
    return float("nan")

def hangs(text, sample):
    time.sleep(3600)

def late(text, sample):
    from pathlib import Path
    # Two workers count: appending one byte is atomic.
    with Path(__file__).with_name("count").open("a") as count:
        calls = count.tell()
        count.write("x")
    if calls >= 40:
        raise ValueError("the answer sheet ended")
    return float(calls % 3)

def late_in_eval(text, sample):
    from pathlib import Path
    if sample.source == "held_out":
        with Path(__file__).with_name("seen").open("a") as seen:
            calls = seen.tell()
            seen.write("x")
        if calls >= 3:
            raise ValueError("the held-out answers ended")
    return float(len(text) % 2)
"""


@pytest.mark.parametrize(("function", "told"), [("raises", "no such answer"), ("nan", "nan"), ("hangs", "1")])
def test_bad_reward(
    function: str, told: str, failing: Run, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    error = failing("train", tiny_recipe, f"rewards=[{{name: 'my_rewards:{function}', timeout: 1.0}}]")
    assert f"my_rewards:{function}" in error and told in error.lower()


def test_reward_that_fails_late_loses_nothing(
    failing: Run, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    failing("train", tiny_recipe, "rewards=[{name: 'my_rewards:late'}]", "run.save_every=0")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_reward_that_fails_in_a_later_evaluation_loses_nothing(
    failing: Run, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 3)
    failing(
        "train", tiny_recipe, "rewards=[{name: 'my_rewards:late_in_eval'}]", "run.save_every=0",
        f"data.eval={tmp_path}/held_out.jsonl", "data.eval_options={plain: true}", "eval.every=2",
    )  # fmt: skip
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 1, 2]


def test_weights_that_diverge_do_not_push_good_checkpoints_out(
    failing: Run, tiny_recipe: Path, tmp_path: Path
) -> None:
    error = failing(
        "train", tiny_recipe, "train.lr=1e30", "train.max_grad_norm=0", "run.save_every=0", "train.steps=20"
    )
    assert "NaN" in error
    assert checkpoints(tmp_path / "run") == []


def test_run_folder_exists(failing: Run, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    assert "exists" in failing("train", tiny_recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "own"))


def test_checkpoint_with_a_missing_shard(failing: Run, tiny_recipe: Path, own_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(own_model / "model.safetensors")
    (own_model / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, own_model / first)
    where = {name: first if i < 3 else second for i, name in enumerate(names)}
    (own_model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert second in failing("train", tiny_recipe, f"model={own_model}")


def test_truncated_checkpoint(failing: Run, tiny_recipe: Path, own_model: Path) -> None:
    path = own_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in failing("train", tiny_recipe, f"model={own_model}")


def test_model_family_that_nobody_serves(failing: Run, tiny_recipe: Path, own_model: Path) -> None:
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    error = failing("train", tiny_recipe, f"model={own_model}")
    assert "MambaForCausalLM" in error and "Qwen2ForCausalLM" in error


def test_op_that_nobody_serves(failing: Run, tiny_recipe: Path) -> None:
    assert "attention.varlen" in failing(
        "train", tiny_recipe, "ops={attention.varlen: cpu:flash_attention_9}"
    )


def test_device_that_is_absent(failing: Run, tiny_recipe: Path) -> None:
    assert "warp" in failing("train", tiny_recipe, "device=warp")


def test_model_that_does_not_exist(failing: Run, tiny_recipe: Path, tmp_path: Path) -> None:
    assert "nowhere" in failing("train", tiny_recipe, f"model={tmp_path}/nowhere")


def test_resume_of_a_folder_that_is_no_run(failing: Run, tmp_path: Path) -> None:
    assert "not a run folder" in failing("train", "--resume", tmp_path)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {family: write_tiny_mixture(root / family, family) for family in ("deepseek_v3", "qwen3_next")}


@pytest.fixture
def deepseek(mixtures: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtures["deepseek_v3"], tmp_path / "deepseek"))


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "n_group", 5),
        ("deepseek_v3", "num_experts_per_tok", 33),
        ("qwen3_next", "attn_output_gate", False),
        ("qwen3_next", "layer_types", ["linear_attention", "sliding_attention", "full_attention"]),
        ("qwen3_next", "linear_num_value_heads", 3),
        ("qwen3_next", "quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_setting_of_a_mixture_that_would_be_computed_wrongly(
    command: str, family: str, key: str, value: object, failing: Run, tiny_recipe: Path,
    mixtures: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    model = Path(shutil.copytree(mixtures[family], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    assert key in failing(command, tiny_recipe, f"model={model}")


EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"


def rewrite(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The checkpoint with its tensors changed in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    assert EXPERT in tensors
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_expert_that_is_missing(failing: Run, tiny_recipe: Path, deepseek: Path) -> None:
    rewrite(deepseek, lambda tensors: tensors.pop(EXPERT))
    error = failing("train", tiny_recipe, f"model={deepseek}")
    assert "missing" in error and EXPERT in error


def test_shard_of_experts_that_is_missing(failing: Run, tiny_recipe: Path, deepseek: Path) -> None:
    where: dict[str, str] = {}
    lost = "model-00002-of-00002.safetensors"

    def split(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            gone = ".experts." in name and name.startswith("model.layers.2.")
            where[name] = lost if gone else "model-00001-of-00002.safetensors"
            if gone:
                tensors.pop(name)

    rewrite(deepseek, split)
    (deepseek / "model.safetensors").rename(deepseek / "model-00001-of-00002.safetensors")
    (deepseek / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert lost in failing("train", tiny_recipe, f"model={deepseek}")


def test_expert_that_holds_nan(failing: Run, tiny_recipe: Path, deepseek: Path) -> None:
    rewrite(deepseek, lambda tensors: tensors[EXPERT][3, 2].fill_(float("nan")))
    error = failing("train", tiny_recipe, f"model={deepseek}")
    assert "NaN" in error and EXPERT in error


def test_selection_bias_that_holds_infinity(failing: Run, tiny_recipe: Path, deepseek: Path) -> None:
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    rewrite(deepseek, lambda tensors: tensors[bias][0].fill_(float("inf")))
    assert bias in failing("train", tiny_recipe, f"model={deepseek}")


def test_float8_expert_without_its_scale(failing: Run, tiny_recipe: Path, deepseek: Path) -> None:
    import torch

    config = json.loads((deepseek / "config.json").read_text())
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (deepseek / "config.json").write_text(json.dumps(config | {"quantization_config": blocks}))

    def quantise(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            if name != EXPERT:
                tensors[name + "_scale_inv"] = torch.ones(1, 1)

    rewrite(deepseek, quantise)
    error = failing("train", tiny_recipe, f"model={deepseek}")
    assert EXPERT in error and "scale" in error
