"""Layers of settings: overrides and recipes laid into the tree that the file gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_origin

from .config import Config
from .config_schema import annotation_at, entry_of, section_of, suggest
from .yaml_source import KeyPath, parse_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One error: where it was written, and what is wrong."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}  {self.text}"

    @property
    def order(self) -> tuple[str, int]:
        """Sorts by file and line."""
        name, _, line = self.where.rpartition(":")
        return (name, int(line)) if line.isdigit() else (self.where, 0)


def lay_override(tree: dict[str, Any], given: dict[KeyPath, str], override: str) -> Iterator[Problem]:
    """Set one `dotted.key=value`; yields what is wrong with it."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    where = f"override {dotted}"
    if not equals or not dotted:
        yield Problem(where=f"override {override!r}", text="is not of the form key=value")
        return
    path = path_of(dotted)
    if known(path) is None:
        yield Problem(where=where, text=unknown(dotted))
        return
    # `data.system=` means the empty text; `data.system=null` is there for a null.
    document = parse_yaml(text, where) if text.strip() else None
    for _, problem in document.problems if document else ():
        yield Problem(where=where, text=problem)
    yield from assign(tree, given, path, document.data if document else "", "command line")


def path_of(dotted: str) -> KeyPath:
    """The path of a dotted key; the key of a flat mapping may hold dots (`ops.attention.varlen`)."""
    path: KeyPath = ()
    parts = dotted.split(".")
    for number, part in enumerate(parts):
        kind = get_origin(known(path)) if path else None
        if kind is dict and entry_of(known(path)) is str:
            return (*path, ".".join(parts[number:]))
        path = (*path, int(part) if kind is list and part.isdigit() else part)
    return path


def known(path: KeyPath) -> Any:
    """The type of a setting, or None where the schema has none."""
    try:
        return annotation_at(path)
    except KeyError:
        return None


def unknown(dotted: str) -> str:
    """What to say of a key that the schema does not have."""
    near = suggest(dotted)
    return f"{dotted} is not a setting" + (f"; did you mean {near}?" if near else "")


def assign(
    tree: dict[str, Any], given: dict[KeyPath, str], path: KeyPath, value: Any, source: str
) -> Iterator[Problem]:
    """Set `path` of the tree, with its source; of a section only the settings that `value` has."""
    dotted = ".".join(map(str, path))
    if section_of(known(path)) is not None and isinstance(value, dict):
        for key, entry in value.items():
            yield from assign(tree, given, (*path, key), entry, source)
        return
    place: Any = tree
    for depth, part in enumerate(path):
        index: Any = part
        if isinstance(place, list) and not (isinstance(part, int) and part < len(place)):
            yield Problem(where=source, text=f"{dotted}: the list has {len(place)} entries, from 0")
            return
        if not isinstance(place, dict | list):
            parent = ".".join(map(str, path[:depth]))
            yield Problem(where=source, text=f"{dotted} cannot be set: {parent} is {place!r}")
            return
        if depth == len(path) - 1:
            place[index] = copy_tree(value)
        elif isinstance(place, dict) and place.get(part) is None:
            # `algo:` with no line below it is null in YAML and an empty section here.
            place[part] = {}
        place = place[index]
    for old in [old for old in given if old[: len(path)] == path]:
        del given[old]
    given[path] = source


def has(tree: Any, path: KeyPath) -> bool:
    """Whether the tree holds something at `path`."""
    for part in path:
        if isinstance(tree, dict):
            inside = part in tree
        else:
            inside = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not inside:
            return False
        tree = tree[part]
    return True


def copy_tree(value: Any) -> Any:
    """A copy whose mappings and lists are its own."""
    if isinstance(value, Mapping):
        return {key: copy_tree(entry) for key, entry in value.items()}
    return [copy_tree(entry) for entry in value] if isinstance(value, list) else value


def prune(value: Any, path: KeyPath) -> tuple[Any, list[tuple[KeyPath, str]]]:
    """The tree without what pydantic cannot judge well, and what is wrong with that."""
    annotation = known(path) if path else Config
    section = section_of(annotation)
    odd: list[tuple[KeyPath, str]] = []
    if isinstance(value, bool) and annotation in (int, float):
        return value, [(path, f"{'.'.join(map(str, path))} should be a number, not {str(value).lower()}")]
    if isinstance(value, Mapping) and section is not None:
        kept = {}
        for key, entry in value.items():
            if key not in section.model_fields:
                odd.append(((*path, key), unknown(".".join(map(str, (*path, key))))))
            elif entry is None and section_of(section.model_fields[key].annotation) is not None:
                continue  # `algo:` with all its lines commented out is an empty section
            else:
                kept[key], more = prune(entry, (*path, key))
                odd += more
        return kept, odd
    if isinstance(value, list) and section_of(entry_of(annotation)) is not None:
        pairs = [prune(entry, (*path, number)) for number, entry in enumerate(value)]
        return [entry for entry, _ in pairs], [item for _, more in pairs for item in more]
    return value, odd
