"""The README's plugin works as it stands there."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from grpo_core.backend import bind
from grpo_core.catalogue import Catalogue
from grpo_core.config_loader import parse_config
from grpo_core.impl import DeviceInfo
from grpo_core.needs import RunFacts, needs_of
from grpo_core.plan import Plan
from grpo_core.plugins import load
from grpo_core.resolve import resolve
from grpo_core.types import Sample

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example's package, written where the README says and imported by its entry point's name."""
    for _, text in BLOCK.findall(README):
        name = text.splitlines()[0].removeprefix("# ")
        if name.startswith("grpo_swish/"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = re.search(r'^swish = "([\w.]+)"$', README, flags=re.MULTILINE)
    assert entry
    yield importlib.import_module(entry.group(1))
    for name in [name for name in sys.modules if name.startswith("grpo_swish")]:
        del sys.modules[name]


def plan_with(plugin: ModuleType, intermediate_size: int) -> tuple[Catalogue, Plan]:
    catalogue = load(extra={"swish": plugin})
    family = catalogue.model_plugin_for(["Qwen2ForCausalLM"])
    arch = family.arch(
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 64, "hidden_size": 64,
            "intermediate_size": intermediate_size, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "max_position_embeddings": 128, "tie_word_embeddings": True, "hidden_act": "silu",
        }
    )  # fmt: skip
    device = DeviceInfo(type="cpu", dtypes=frozenset({"float32", "bfloat16"}))
    needs = needs_of(arch, RunFacts(train_dtype="float32", rollout_dtype="float32"))
    return catalogue, resolve(needs, catalogue, device)


def test_the_example_loads_without_complaint(plugin: ModuleType) -> None:
    catalogue = load(extra={"swish": plugin})
    assert [failure for failure in catalogue.failures if failure.plugin == "swish"] == []
    assert "grpo_swish.ops" not in sys.modules, "only the plan's choice may import the code"


def test_the_example_is_chosen_bound_and_right(plugin: ModuleType) -> None:
    _, plan = plan_with(plugin, intermediate_size=128)
    assert plan.choice("mlp.swiglu").chosen == "swish:plain"
    gate_up = torch.randn(5, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = bind(plan).mlp.swiglu(gate_up.float())
    gate, up = gate_up.split(128, dim=-1)
    # float32 rounding of two products and one sigmoid
    torch.testing.assert_close(got.double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-6)


def test_the_example_refuses_with_the_reason_that_the_readme_quotes(plugin: ModuleType) -> None:
    _, plan = plan_with(plugin, intermediate_size=100)
    row = plan.choice("mlp.swiglu")
    assert row.chosen != "swish:plain"
    reasons = {passed.id: passed.reason for passed in row.passed}
    assert reasons["swish:plain"] in " ".join(README.split())


def test_the_example_reward_is_registered(plugin: ModuleType) -> None:
    catalogue, _ = plan_with(plugin, intermediate_size=128)
    polite = catalogue.registry.get("reward", "polite")
    assert polite("Yes, please.", Sample(id="a")) == 1.0
    assert polite("No.", Sample(id="b")) == 0.0


def test_the_readme_configuration_is_valid() -> None:
    (text,) = [text for kind, text in BLOCK.findall(README) if kind == "yaml"]
    config = parse_config(text).config
    assert config.train.lr == 1e-5
    assert config.rewards[0].name == "number"
