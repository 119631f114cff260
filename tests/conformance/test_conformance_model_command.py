"""`grpo conformance model NAME`: a family's verdict through the machinery of the suite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from grpo_conformance import model_cases, model_more
from grpo_conformance.case import Case, Outcome, Target, check_of
from grpo_conformance.model_case import ModelCase
from grpo_conformance.model_tiny import few_layers, shrunk, tiny_model, variants_of
from grpo_conformance.target import open_target
from grpo_core.cli.main import main
from grpo_core.errors import ConfigError
from grpo_core.impl import DeviceInfo
from grpo_core.model.plugin import Advice, ChatSpec

FAMILIES = ("llama", "qwen2_5", "qwen3", "qwen3_moe", "deepseek_v3", "qwen3_next")


@pytest.fixture(scope="module")
def target() -> Target:
    return open_target("cpu")


def cases_of(target: Target, name: str, *, quick: bool = True, levels: tuple[str, ...] = ()) -> list[Case]:
    chosen = model_cases.pick_levels(levels)
    return model_cases.cases(name, target.catalogue, levels=chosen, quick=quick)


def asked(target: Target, case: Case) -> Outcome:
    outcome: Outcome = check_of(case)(target, **case.args)
    return outcome


def changed(target: Target, name: str, **changes: Any) -> Target:
    """The target with one family that does one thing otherwise."""
    inner = target.catalogue.models[name]

    class Odd:
        def __getattr__(self, key: str) -> Any:
            return changes[key] if key in changes else getattr(inner, key)

    models: Mapping[str, Any] = {**target.catalogue.models, name: Odd()}
    return replace(target, catalogue=replace(target.catalogue, models=models))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bundled_family_passes_a_quick_run(target: Target, name: str) -> None:
    cases = cases_of(target, name)
    assert {case.level for case in cases} == set(range(len(model_cases.LEVELS)))
    found = {case.id: asked(target, case) for case in cases}
    wrong = [f"{name}: {outcome.message}" for name, outcome in found.items() if outcome.status != "pass"]
    assert not wrong, "\n".join(wrong)
    measured = [outcome for outcome in found.values() if outcome.error is not None]
    assert len(measured) == 4 and all(0 <= o.error <= o.tolerance for o in measured)  # type: ignore[operator]


def test_variants_are_those_that_a_config_has(target: Target) -> None:
    cases = cases_of(target, "deepseek_v3", quick=False)
    assert {case.args["variant"] for case in cases} == {"plain", "tied embeddings", "biases", "whole queries"}
    assert {case.args["seed"] for case in cases if case.level == 1} == {0, 1}
    assert len({case.id for case in cases}) == len(cases)
    assert not any(" " in case.id for case in cases)


@pytest.mark.parametrize("variant", ["whole queries", "biases"])
def test_a_variant_passes(target: Target, variant: str) -> None:
    cases = cases_of(target, "deepseek_v3", quick=False, levels=("parity",))
    outcomes = [asked(target, case) for case in cases if case.args["variant"] == variant]
    assert outcomes and all(outcome.status == "pass" for outcome in outcomes)


def wrong_epsilon(target: Target) -> Any:
    inner = target.catalogue.models["qwen3"]
    return lambda config: replace(inner.arch(config), rms_norm_eps=0.05)


def test_a_family_that_computes_otherwise_fails_with_the_error_beside_the_tolerance(target: Target) -> None:
    odd = changed(target, "qwen3", arch=wrong_epsilon(target))
    for case in cases_of(odd, "qwen3", levels=("parity",)):
        outcome = asked(odd, case)
        assert outcome.status == "fail" and "off" in outcome.message
        assert outcome.error is not None and outcome.tolerance is not None
        assert outcome.error > outcome.tolerance
        assert outcome.worst["where"] and outcome.worst["config"]["hidden_size"] == 36


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"train.speed": Advice(value=1, why="x")}, "is refused"),
        ({"train.lr": Advice(value="fast", why="x")}, "is refused"),
        ({"train.lr": Advice(value=1e-6, why=" ")}, "has no reason"),
        ({"train.lr": 1e-6}, "not an Advice"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_told(target: Target, recipe: dict[str, Any], told: str) -> None:
    odd = changed(target, "qwen3", recipe=lambda arch, device, world: recipe)
    (case,) = cases_of(odd, "qwen3", levels=("recipe",))
    outcome = asked(odd, case)
    assert outcome.status == "fail" and told in outcome.message


def test_a_recipe_is_asked_for_devices_of_all_kinds(target: Target) -> None:
    def recipe(arch: Any, device: DeviceInfo, world: int) -> dict[str, Advice]:
        if "bfloat16" not in device.dtypes and world > 1:
            return {"train.dtype": Advice(value="float8", why="it is small")}
        return {}

    odd = changed(target, "qwen3", recipe=recipe)
    (case,) = cases_of(odd, "qwen3", levels=("recipe",))
    assert "on a chip without bfloat16 with 8 processes" in asked(odd, case).message


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (ChatSpec(stop_tokens="<end>"), "must be a tuple"),  # type: ignore[arg-type]
        (ChatSpec(stop_tokens=("<end>", "")), "must be a tuple"),
        (ChatSpec(thinking="enable thinking"), "name of a variable"),
    ],
)
def test_chat_settings_that_cannot_be_heeded_are_told(target: Target, spec: ChatSpec, told: str) -> None:
    odd = changed(target, "qwen3", chat=lambda: spec)
    (case,) = cases_of(odd, "qwen3", levels=("chat",))
    outcome = asked(odd, case)
    assert outcome.status == "fail" and told in outcome.message


def test_a_map_that_mixes_up_shards_is_told(target: Target) -> None:
    """One that takes tensors by their order: right for a single file, wrong for two."""
    inner = target.catalogue.models["qwen3"]

    class ByOrder:
        def __init__(self, table: Any) -> None:
            self.table = table

        def __getattr__(self, name: str) -> Any:
            return getattr(self.table, name)

        def load(self, tensors: Any, into: Any) -> None:
            held = list(tensors)
            gates = [i for i, (name, _) in enumerate(held) if name.endswith("gate_proj.weight")]
            if [name for name, _ in held] != sorted(name for name, _ in held):
                first, last = gates[0], gates[-1]
                (a, x), (b, y) = held[first], held[last]
                held[first], held[last] = (a, y), (b, x)
            self.table.load(iter(held), into)

    usual = tiny_model("Qwen3ForCausalLM", model_cases._config(
        model_cases.find("qwen3", target.catalogue), "Qwen3ForCausalLM"), {}, 0)  # fmt: skip
    config = {**usual.config.to_dict(), "architectures": ["Qwen3ForCausalLM"]}

    def case(family: Any) -> ModelCase:
        return ModelCase(family=family, hf_config=config, hf_model=usual)

    assert model_more.check_shards(case(inner)).error <= 1e-4
    odd = changed(target, "qwen3", weights=lambda arch: ByOrder(inner.weights(arch)))
    with pytest.raises(AssertionError, match="come otherwise"):
        model_more.check_shards(case(odd.catalogue.models["qwen3"]))


def test_an_architecture_that_transformers_lacks_is_not_declared(target: Target) -> None:
    odd = changed(target, "qwen3", architectures=("NobodyForCausalLM",))
    outcomes = [asked(odd, case) for case in cases_of(odd, "qwen3", levels=("parity",))]
    assert {outcome.status for outcome in outcomes} == {"not_declared"}
    assert "has no NobodyForCausalLM" in outcomes[0].message


def test_what_a_name_may_be(target: Target, tmp_path: Path) -> None:
    find, catalogue = model_cases.find, target.catalogue
    assert find("qwen3", catalogue).architectures == ("Qwen3ForCausalLM",)
    assert find("Qwen3NextForCausalLM", catalogue).family == "qwen3_next"
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    subject = find(str(tmp_path), catalogue)
    assert (subject.family, subject.folder) == ("qwen3", str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'qwen3'"):
        find("qwen33", catalogue)
    with pytest.raises(ConfigError, match="did you mean 'LlamaForCausalLM'"):
        find("LlamaForCausal", catalogue)
    with pytest.raises(ConfigError, match="did you mean 'parity'"):
        model_cases.pick_levels(["parit"])


def test_a_folder_is_asked_as_it_was_published(target: Target, tmp_path: Path) -> None:
    """Its own rotary base, tying and layers, in small; without a tokenizer nothing is said of chatting."""
    published = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "head_dim": 128,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
        "intermediate_size": 12288, "tie_word_embeddings": True, "rms_norm_eps": 0.01,
        "torch_dtype": "bfloat16", "rope_theta": 50000.0, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    cases = cases_of(target, str(tmp_path))
    found = {case.args["check"]: asked(target, case) for case in cases}
    assert found.pop("chat").status == "not_declared"
    assert {outcome.status for outcome in found.values()} == {"pass"}
    small = shrunk(published)
    assert (small["rms_norm_eps"], small["tie_word_embeddings"], small["rope_theta"]) == (0.01, True, 50000.0)
    assert small["hidden_size"] < 64 and small["head_dim"] == 16 and "quantization_config" not in small


def test_small_configs_keep_what_decides_the_kind_of_a_layer() -> None:
    assert few_layers(["linear", "linear", "full"] * 9) == ["linear", "linear", "full", "full"]
    assert few_layers(["full"] * 30) == ["full"] * 4
    published = {
        "q_lora_rank": None, "qk_rope_head_dim": 64, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_group": 8, "topk_group": 4, "sliding_window": 4096,
    }  # fmt: skip
    latent = shrunk(published)
    assert latent["q_lora_rank"] is None and latent["num_key_value_heads"] == latent["num_attention_heads"]
    assert (latent["n_group"], latent["topk_group"], latent["sliding_window"]) == (4, 2, 5)
    assert shrunk({"n_group": 1, "topk_group": 1, "sliding_window": None}) == {
        "n_group": 1, "topk_group": 1, "sliding_window": None,
    }  # fmt: skip
    assert set(variants_of({"attention_bias": False, "n_group": 1})) == {"plain", "biases", "sigmoid groups"}


@pytest.mark.slow
def test_the_command_writes_every_kind_of_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    known = tmp_path / "known.toml"
    known.write_text('[[known]]\ncase = "model/qwen4/*"\nreason = "none such"\n')
    words = ["conformance", "model", "Qwen2ForCausalLM", "--quick", "--json", "m.json", "--html", "m.html"]
    code = main([*words, "--junit", "m.xml", "--known", "known.toml"])
    out = capsys.readouterr().out
    assert code == 1 and "is about no case" in out and "qwen2_5: fail" in out
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["model"]["family"] == "qwen2_5" and content["verdict"] == "fail"
    assert {row["verdict"] for row in content["levels"]} == {"pass"}
    assert [row["state"] for row in content["known"]] == ["no case"]
    assert [row["name"] for row in content["levels"]] == list(model_cases.LEVELS)
    assert main(["conformance", "verify", "m.json"]) == 0
    assert main(["conformance", "diff", "m.json", "m.json"]) == 0
    page = (tmp_path / "m.html").read_text()
    assert "Qwen2ForCausalLM" in page and "parity" in page
    suite = ElementTree.parse(tmp_path / "m.xml").getroot()[0]
    assert suite.get("tests") == str(len(content["cases"])) and suite.get("failures") == "0"
    assert main(["conformance", "model", "Qwen2ForCausalLM", "--collect-only", "-k", "logits"]) == 0


def test_mistakes_of_the_command_are_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["model", "qwen33"], ["model"], ["model", "qwen3", "--level", "parit"]):
        assert main(["conformance", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 3
