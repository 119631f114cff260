"""YAML as a config file needs it: the 1.2 core schema, no duplicate keys, the line of every value kept.

Source: YAML 1.2.2, section 10.3 (core schema). PyYAML scans and parses; its 1.1 resolver and its
constructor are not used, so `on` is a string, `1e-6` a float, `0777` the integer 777 and `1:30` a string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import ConfigError

KeyPath = tuple[str | int, ...]

MAX_VALUES = 100_000
"""Nested aliases multiply; no configuration has this many values."""

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own way


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's 1.1 resolvers besides ours: what either reads as no string is written in quotes."""


for _name, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
    _whole = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _whole, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlDocument:
    """Plain data with the line (from 1) of each key and list entry, and the duplicate keys found."""

    data: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[tuple[int, str], ...] = ()


@dataclass(slots=True)
class _Walk:
    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: dict[tuple[int, str], None] = field(default_factory=dict)
    open_nodes: set[int] = field(default_factory=set)
    count: int = 0


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Parse one document; `name` stands before the line in messages.

    Raises `ConfigError` for broken syntax, an unknown tag, a list or mapping as a key, an alias that
    holds itself. Duplicate keys are returned in `problems`, so that they are told with the other errors.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _broken(name, mark.line + 1 if mark else 0, str(error.problem or error.context)) from error
    except yaml.reader.ReaderError as error:
        raise _broken(name, text.count("\n", 0, error.position) + 1, error.reason) from error
    except RecursionError as error:
        raise _broken(name, 0, "it is nested too deeply") from error
    if node is None:
        return YamlDocument(data=None, lines={})
    walk = _Walk(name)
    data = _value(node, (), walk)
    return YamlDocument(data=data, lines=walk.lines, problems=tuple(walk.problems))


def dump(data: Any) -> str:
    """Block-style YAML that `parse_yaml` reads back as the same data; keys keep their order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110)
    return text


def _broken(name: str, line: int, why: str) -> ConfigError:
    where = f"{name}:{line}" if line else name
    return ConfigError(
        f"{where} is not valid YAML",
        why=why.strip().replace("\n", " "),
        fix='mend that line; a value that holds one of : # { } [ ] , & * ! | > % @ ` goes in "quotes"',
    )


def _value(node: yaml.Node, path: KeyPath, walk: _Walk) -> Any:
    line = node.start_mark.line + 1
    walk.lines.setdefault(path, line)
    walk.count += 1
    if walk.count > MAX_VALUES:
        raise _broken(walk.name, line, f"its aliases expand to more than {MAX_VALUES} values")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, walk.name)
    if node.tag not in (_TAG + "map", _TAG + "seq"):
        raise _broken(walk.name, line, f"the tag {node.tag} is not known here")
    if id(node) in walk.open_nodes:
        raise _broken(walk.name, line, "an alias holds itself")
    walk.open_nodes.add(id(node))
    data: Any
    if isinstance(node, yaml.SequenceNode):
        data = [_value(entry, (*path, number), walk) for number, entry in enumerate(node.value)]
    else:
        data = _mapping(node, path, walk)
    walk.open_nodes.discard(id(node))
    return data


def _mapping(node: yaml.Node, path: KeyPath, walk: _Walk) -> dict[str, Any]:
    data: dict[str, Any] = {}
    seen: dict[str, int] = {}
    merged: list[yaml.Node] = []
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise _broken(walk.name, line, "a key is a list or a mapping")
        # A key is its own text: `on:`, `1:` and `null:` are the names that they look like.
        key = key_node.value
        if key in seen:
            dotted = ".".join(map(str, (*path, key)))
            walk.problems[line, f"{dotted} is given twice, first in line {seen[key]}"] = None
            continue
        seen[key] = line
        if key == "<<" and key_node.style is None:
            merged.extend(_merge_nodes(value_node, walk))
            continue
        walk.lines.setdefault((*path, key), line)
        data[key] = _value(value_node, (*path, key), walk)
    for source in merged:
        for key, value in _value(source, (*path, "<<"), walk).items():
            if key not in data:
                data[key] = value
                _move_lines(walk, (*path, "<<", key), (*path, key))
        _move_lines(walk, (*path, "<<"), None)
    return data


def _merge_nodes(node: yaml.Node, walk: _Walk) -> Iterator[yaml.Node]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for entry in nodes:
        if not isinstance(entry, yaml.MappingNode):
            raise _broken(walk.name, entry.start_mark.line + 1, "<< merges mappings only")
        yield entry


def _move_lines(walk: _Walk, old: KeyPath, new: KeyPath | None) -> None:
    for path in [path for path in walk.lines if path[: len(old)] == old]:
        line = walk.lines.pop(path)
        if new is not None:
            walk.lines[(*new, *path[len(old) :])] = line


def _scalar(node: yaml.ScalarNode, name: str) -> Any:
    tag, text = node.tag.removeprefix(_TAG), node.value
    line = node.start_mark.line + 1
    if tag == "str":
        return text
    pattern = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}.get(tag)
    if pattern is None:
        raise _broken(name, line, f"the tag {node.tag} is not known here")
    if not pattern.fullmatch(text):
        raise _broken(name, line, f"{text!r} is no {tag}")
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        if len(text) > 4000:
            raise _broken(name, line, f"an integer of {len(text)} digits")
        return int(text, base)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
