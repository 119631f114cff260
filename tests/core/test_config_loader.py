"""Layers, sources, overrides and errors of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.config import AlgoConfig, Config, DataConfig, RewardConfig, TrainConfig
from grpo_core.config_loader import dump_yaml, load_config, merge_recipe, parse_config
from grpo_core.config_schema import ALIASES, leaf_keys, suggest
from grpo_core.errors import ConfigError
from grpo_core.model.plugin import Advice

BASE = """model: some/model
data:
  train: train.jsonl
rewards:
  - name: exact
"""


def failing(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "run.yaml", overrides)
    return str(caught.value)


def test_smallest_config() -> None:
    loaded = parse_config(BASE, "run.yaml")
    assert loaded.config.data.train == "train.jsonl"
    assert loaded.config.algo == AlgoConfig()
    assert loaded.warnings == ()
    assert loaded.sources["model"] == "run.yaml:1"
    assert loaded.sources["data.train"] == "run.yaml:3"
    assert loaded.sources["rewards.0.name"] == "run.yaml:5"
    assert loaded.sources["algo.group_size"] == "default"


def test_every_setting_has_a_source() -> None:
    sources = parse_config(BASE, "run.yaml", ["ops.attention.varlen=a:b", "data.options.size=3"]).sources
    for key in leaf_keys():
        if "*" not in key:
            assert key in sources or any(name.startswith(key + ".") for name in sources), key


def test_the_schema_stays_small() -> None:
    assert 55 <= len(leaf_keys()) <= 81


def test_aliases_point_at_settings_that_exist() -> None:
    known = {*leaf_keys(), *Config.model_fields}
    assert {key for key in ALIASES.values() if key not in known} == set()


def test_all_errors_at_once_each_with_its_line() -> None:
    text = BASE + (
        "algo:\n  group_sise: 8\n  clip_low: -1\n  group_size: true\n"
        "train:\n  lr: fast\n  steps: 1.5\n  lr: 1e-6\nnum_generations: 4\n"
    )
    shown = failing(text, "train.betta1=0.5", "run.seed=x", "nonsense")
    for line in (
        "run.yaml:7  algo.group_sise is not a setting; did you mean algo.group_size?",
        "run.yaml:8  algo.clip_low should be greater than or equal to 0, not -1",
        "run.yaml:9  algo.group_size should be a number, not true",
        "run.yaml:11  train.lr should be a valid number, not 'fast'",
        "run.yaml:12  train.steps should be a valid integer, not 1.5",
        "run.yaml:13  train.lr is given twice, first in line 11",
        "run.yaml:14  num_generations is not a setting; did you mean algo.group_size?",
        "override train.betta1  train.betta1 is not a setting; did you mean train.beta1?",
        "command line  run.seed should be a valid integer, not 'x'",
        "override 'nonsense'  is not of the form key=value",
    ):
        assert line in shown
    assert shown.startswith("10 problems in the configuration (run.yaml)")


def test_missing_settings_are_named() -> None:
    shown = failing("device: cpu\n")
    assert "model is missing" in shown
    assert "data is missing" in shown
    assert "rewards is missing" in shown


def test_empty_sections_are_their_defaults() -> None:
    loaded = parse_config(BASE + "algo:\ntrain:\n  # lr: 1e-6\n", "run.yaml", ["algo.group_size=4"])
    assert loaded.config.algo.group_size == 4
    assert loaded.config.train == TrainConfig()


def test_a_null_where_a_value_belongs_is_told() -> None:
    assert "run.yaml:7  train.lr should be a valid number, not None" in failing(BASE + "train:\n  lr:\n")


def test_a_number_where_a_text_belongs_says_how_to_write_it() -> None:
    assert 'run.name should be a valid string, not 7; put it in "quotes"' in failing(BASE, "run.name=7")


def test_a_value_in_the_wrong_shape() -> None:
    assert "run.yaml:6  algo should be" in failing(BASE + "algo: 3\n").replace("\n", " ")
    assert "is not a configuration" in failing("- a\n- b\n")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("group_size", "algo.group_size"), ("lr", "train.lr"), ("learning_rate", "train.lr"),
        ("algo.max_tokens", "rollout.max_tokens"), ("rollout.maxtokens", "rollout.max_tokens"),
        ("rewards.1.wieght", "rewards.1.weight"), ("modle", "model"), ("seed", "run.seed"),
        ("actor_rollout_ref.actor.clip_ratio_c", "algo.clip_dual"), ("xyzzy", None),
    ],
)  # fmt: skip
def test_did_you_mean(typed: str, meant: str | None) -> None:
    assert suggest(typed) == meant


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.lr=1e-6", ("train", "lr"), 1e-6),
        ("rollout.stop=[a, 'b c']", ("rollout", "stop"), ["a", "b c"]),
        ("data.options={size: 5, deep: {x: on}}", ("data", "options"), {"size": 5, "deep": {"x": "on"}}),
        ("data.options.size=5", ("data", "options"), {"size": 5}),
        ("data.options.deep.x=5", ("data", "options"), {"deep": {"x": 5}}),
        ("ops.attention.varlen=cpu:onednn", ("ops",), {"attention.varlen": "cpu:onednn"}),
        ("data.system=", ("data", "system"), ""),
        ("data.train=reasoning-gym:chain_sum", ("data", "train"), "reasoning-gym:chain_sum"),
        ("data.suffix=a=b", ("data", "suffix"), "a=b"),
        ("run.name='12'", ("run", "name"), "12"),
        ("algo={group_size: 2, clip_low: 0.1}", ("algo", "clip_low"), 0.1),
        ("train.share_prompt=false", ("train", "share_prompt"), False),
    ],
)
def test_overrides(override: str, path: tuple[str, ...], value: object) -> None:
    found: object = parse_config(BASE, "run.yaml", [override]).config
    for name in path:
        found = getattr(found, name)
    assert found == value


def test_overrides_reach_into_lists() -> None:
    loaded = parse_config(BASE, "run.yaml", ["rewards.0.weight=2"])
    assert loaded.config.rewards == [RewardConfig(name="exact", weight=2)]
    assert loaded.sources["rewards.0.weight"] == "command line"
    assert "the list has 1 entries" in failing(BASE, "rewards.1.weight=2")


def test_the_last_override_wins_and_a_section_override_keeps_the_other_keys() -> None:
    text = BASE + "algo:\n  clip_low: 0.3\n"
    algo = parse_config(text, "run.yaml", ["algo={group_size: 4}", "algo.group_size=6"]).config.algo
    assert (algo.clip_low, algo.group_size) == (0.3, 6)


def test_broken_override_is_an_error_with_its_key() -> None:
    assert "override rollout.stop" in failing(BASE, "rollout.stop=[a")
    assert "given twice" in failing(BASE, "data.options={a: 1, a: 2}")
    assert "cannot be set" in failing(BASE, "data.options=3", "data.options.size=4")


def advice(values: dict[str, object]) -> dict[str, Advice]:
    return {key: Advice(value=value, why="tests") for key, value in values.items()}


def test_recipe_lies_below_file_and_overrides() -> None:
    loaded = parse_config(BASE + "train:\n  lr: 3e-6\n", "run.yaml", ["algo.group_size=4"])
    recipe = advice({"train.lr": 1e-5, "algo.group_size": 16, "rollout.temperature": 0.8})
    merged = merge_recipe(loaded, recipe, "family")
    assert merged.config.train.lr == 3e-6
    assert merged.config.algo.group_size == 4
    assert merged.config.rollout.temperature == 0.8
    assert merged.sources["train.lr"] == "run.yaml:7"
    assert merged.sources["algo.group_size"] == "command line"
    assert merged.sources["rollout.temperature"] == "recipe of family: tests"
    assert loaded.config.rollout.temperature == 1.0, "the loaded one is not changed"


def test_recipe_with_a_wrong_key_or_value_is_an_error() -> None:
    loaded = parse_config(BASE, "run.yaml")
    with pytest.raises(
        ConfigError, match=r"recipe of family  train\.lrr is not a setting; did you mean train\.lr"
    ):
        merge_recipe(loaded, advice({"train.lrr": 1}), "family")
    with pytest.raises(ConfigError, match=r"recipe of family: tests  train\.lr should be"):
        merge_recipe(loaded, advice({"train.lr": -1}), "family")


def test_recipe_is_checked_against_the_file() -> None:
    loaded = parse_config(BASE + "rollout:\n  max_tokens: 4\n", "run.yaml")
    with pytest.raises(ConfigError, match="min_tokens 8 is above"):
        merge_recipe(loaded, advice({"rollout.min_tokens": 8}), "family")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_config(path).config.model == "some/model"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"holds run\.yaml"):
        load_config(tmp_path / "rnu.yaml")
    with pytest.raises(ConfigError, match="model is missing"):
        load_config(None)


def test_yes_and_off_stay_texts_for_text_settings() -> None:
    assert parse_config(BASE + "run:\n  name: on\n").config.run.name == "on"


TEXTS = st.text(min_size=1, max_size=8)


@given(
    name=TEXTS,
    lr=st.floats(1e-12, 1.0),
    stop=st.lists(TEXTS, max_size=3),
    options=st.dictionaries(TEXTS, st.integers() | TEXTS | st.booleans(), max_size=3),
    seed=st.integers(-(2**63), 2**63),
)
@settings(max_examples=60, deadline=None)
def test_dump_round_trips(
    name: str, lr: float, stop: list[str], options: dict[str, object], seed: int
) -> None:
    start = parse_config(BASE).config
    config = start.model_copy(
        update={
            "data": DataConfig(train=name, options=options),
            "train": TrainConfig(lr=lr),
            "rollout": start.rollout.model_copy(update={"stop": stop}),
            "run": start.run.model_copy(update={"seed": seed}),
        }
    )
    assert parse_config(dump_yaml(config)).config == config


def test_switches_whose_values_are_words_of_yaml() -> None:
    text = BASE.replace("data:\n", "data:\n  thinking: off\n") + "train:\n  mtp: off\n"
    config = parse_config(text, "run.yaml", ["data.thinking=on"]).config
    assert (config.data.thinking, config.train.mtp) == ("on", "off")
    assert parse_config(text).config.data.thinking == "off"
