"""YAML 1.2 core schema: the traps of YAML 1.1 are closed, lines are kept, dumps read back."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.errors import ConfigError
from grpo_core.yaml_source import dump, parse_yaml


def read(text: str) -> object:
    document = parse_yaml(text, "t.yaml")
    assert not document.problems
    return document.data


# YAML 1.2.2, section 10.3.2: the table of the core schema, and the traps of 1.1 around it.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-2.5e+3", -2500.0), ("5e-05", 5e-5),
        ("12", 12), ("-7", -7), ("+3", 3), ("0777", 777), ("0o17", 15), ("0x1F", 31),
        ("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("Null", None),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"),
        ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("1_000", "1_000"), ("0b101", "0b101"),
        ("2024-01-31", "2024-01-31"), ("tRue", "tRue"), ("0x", "0x"), ("1e", "1e"), ("e5", "e5"), (".", "."),
        ("=", "="), ("'12'", "12"), ('"1e-6"', "1e-6"), ("'true'", "true"), ("!!str 12", "12"),
        ("!!float 3", 3.0), ("1e-6abc", "1e-6abc"), ("12\n  34", "12 34"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = read(f"key: {text}")
    assert found == {"key": value}
    assert type(found["key"]) is type(value)  # type: ignore[index]


def test_infinities_and_nan() -> None:
    assert read("[.inf, -.Inf, +.INF]") == [math.inf, -math.inf, math.inf]
    assert math.isnan(read(".nan"))  # type: ignore[arg-type]


def test_keys_are_their_text() -> None:
    assert read("on: 1\n1: 2\nnull: 3\ntrue: 4\n1e-6: 5") == {
        "on": 1,
        "1": 2,
        "null": 3,
        "true": 4,
        "1e-6": 5,
    }


def test_duplicate_keys_are_told_with_both_lines() -> None:
    document = parse_yaml("a:\n  x: 1\n  y: 2\n  x: 3\nb: 1\nb: 2\n", "t.yaml")
    assert document.problems == (
        (4, "a.x is given twice, first in line 2"),
        (6, "b is given twice, first in line 5"),
    )


def test_duplicate_keys_that_only_look_different_as_11_values() -> None:
    assert parse_yaml('a: 1\n"a": 2', "t.yaml").problems


def test_lines_are_kept_for_keys_and_list_entries() -> None:
    lines = parse_yaml("a: 1\nb:\n  - x: 1\n    y: 2\n  - {z: 3,\n     w: 4}\n", "t.yaml").lines
    expected = {("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 0, "x"): 3, ("b", 0, "y"): 4, ("b", 1): 5}
    assert expected.items() <= lines.items()
    assert lines["b", 1, "w"] == 6


def test_anchors_and_merge() -> None:
    text = "base: &b {x: 1, y: 2}\none: *b\ntwo:\n  <<: *b\n  y: 3\nthree:\n  <<: [{x: 9}, *b]\n"
    document = parse_yaml(text, "t.yaml")
    assert document.data == {
        "base": {"x": 1, "y": 2}, "one": {"x": 1, "y": 2}, "two": {"y": 3, "x": 1}, "three": {"x": 9, "y": 2},
    }  # fmt: skip
    assert document.lines["two", "x"] == 1
    assert not any("<<" in path for path in document.lines)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [1, 2\nb: 3", "t.yaml:2"),
        ("a:\n\t- 1", "t.yaml:2"),
        ("a: 1\n b: 2", "t.yaml:2"),
        ("? [1, 2]\n: 3", "a key is a list"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !!timestamp 2024-01-01", "tag"),
        ("a: !!int x", "'x' is no int"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: *nowhere", "undefined alias"),
        ("a: &x [*x]", "an alias holds itself"),
        ("a: \x01", "special characters are not allowed"),
        ("<<: 3", "<< merges mappings only"),
    ],
)
def test_broken_yaml_is_one_error_with_its_line(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "t.yaml")
    assert "t.yaml:" in caught.value.what
    assert why in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_aliases_that_multiply_are_refused_quickly() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml(text, "t.yaml")


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("[" * 5000, "t.yaml")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(
        ["on", "yes", "1e-6", "0777", "1:30", "~", "", "null", "<<", "2024-01-01", "=", "0o7", ".5"]
    )
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(DATA)
@settings(max_examples=150, deadline=None)
def test_dump_reads_back_as_the_same_data(data: object) -> None:
    found = read(dump(data))
    assert found == data
    assert repr(found) == repr(data)


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=12), max_size=4))
@settings(max_examples=100, deadline=None)
def test_dumped_text_stays_text_for_yaml_11_readers_too(data: dict[str, str]) -> None:
    assert yaml.safe_load(dump(data)) == data


@given(st.text(alphabet="abo01 \n:-[]{}&*!|>'\"%@`#,?=~.eE+<\t\\", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_data_or_a_config_error(text: str) -> None:
    try:
        document = parse_yaml(text, "t.yaml")
    except ConfigError:
        return
    count = text.count("\n") + 1
    assert all(1 <= line <= count for line in document.lines.values())
