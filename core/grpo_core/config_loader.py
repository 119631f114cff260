"""From a YAML file, a model's recipe and `key=value` overrides to a `Config`, or to all errors at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .config import Config
from .config_checks import cross_checks
from .config_schema import annotation_at, entry_of, leaf_keys, section_of, suggest
from .errors import ConfigError
from .yaml_source import KeyPath, dump, parse_yaml

_MISSING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One error: where it was written, and what is wrong."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}  {self.text}"

    @property
    def order(self) -> tuple[str, int]:
        name, _, line = self.where.rpartition(":")
        return (name, int(line)) if line.isdigit() else (self.where, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A valid configuration and where each of its values comes from."""

    config: Config
    sources: Mapping[str, str]
    """Dotted key -> "default", "recipe", "<file>:<line>" or "override"."""
    warnings: tuple[str, ...]
    """Settings that are allowed but hardly meant, one line each."""
    tree: Mapping[str, Any]
    """What was given, before defaults."""
    given: Mapping[KeyPath, str]
    """Source of each value of `tree` by its path."""
    name: str
    """The file, for messages."""


def load_config(file: Path | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read `file` (None for none), lay the overrides over it and validate the whole.

    Raises one `ConfigError` that lists every unknown key, wrong value and contradiction with its line.
    """
    name, text = "the command line", ""
    if file is not None:
        name, text = file.name, _read(file)
    return parse_config(text, name, overrides)


def parse_config(text: str, name: str = "config.yaml", overrides: Sequence[str] = ()) -> LoadedConfig:
    """The same from the text of a file called `name`."""
    document = parse_yaml(text, name)
    tree = {} if document.data is None else document.data
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{name} is not a configuration",
            why=f"it holds a {type(tree).__name__}, not `key: value` lines",
            fix="start from one of recipes/*.yaml",
        )
    given = {path: f"{name}:{line}" for path, line in document.lines.items() if path}
    problems = [Problem(where=f"{name}:{line}", text=text) for line, text in document.problems]
    for override in overrides:
        problems.extend(_override(tree, given, override))
    return _validated(tree, given, name, problems)


def merge_recipe(loaded: LoadedConfig, recipe: Mapping[str, Any]) -> LoadedConfig:
    """`loaded` with a model family's defaults (dotted key -> value) below the file and the overrides.

    Raises `ConfigError` for a recipe with a key or value that the schema does not know.
    """
    tree = _copy(loaded.tree)
    given = dict(loaded.given)
    problems = []
    for dotted, value in recipe.items():
        path = _path_of(dotted)
        if _known(path) is None:
            problems.append(Problem(where="recipe", text=_unknown(dotted)))
        elif not _has(tree, path):
            problems.extend(_assign(tree, given, path, value, "recipe"))
    return _validated(tree, given, loaded.name, problems)


def dump_yaml(config: Config) -> str:
    """The whole configuration as YAML; `parse_config` reads back an equal one."""
    return dump(config.model_dump())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(path.name for path in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        raise ConfigError(
            f"{file} does not exist",
            why=f"{file.parent}/ holds {', '.join(near[:8]) or 'no YAML file'}",
            fix="give the path of a configuration file, e.g. one of recipes/*.yaml",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read", why=str(error), fix="give a YAML file in UTF-8 that you may read"
        ) from error


def _override(tree: dict[str, Any], given: dict[KeyPath, str], override: str) -> Iterator[Problem]:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    where = f"override {dotted}"
    if not equals or not dotted:
        yield Problem(where=f"override {override!r}", text="is not of the form key=value")
        return
    path = _path_of(dotted)
    if _known(path) is None:
        yield Problem(where=where, text=_unknown(dotted))
        return
    # `data.system=` means the empty text; `data.system=null` is there for a null.
    document = parse_yaml(text, where) if text.strip() else None
    for _, problem in document.problems if document else ():
        yield Problem(where=where, text=problem)
    yield from _assign(tree, given, path, document.data if document else "", "override")


def _path_of(dotted: str) -> KeyPath:
    """The path of a dotted key; the key of a flat mapping may hold dots (`ops.attention.varlen`)."""
    parts = dotted.split(".")
    for length in range(1, len(parts)):
        annotation = _known(tuple(parts[:length]))
        value = entry_of(annotation)
        if value is not None and value is not Any and section_of(value) is None and annotation != list[value]:  # type: ignore[valid-type]
            return (*parts[:length], ".".join(parts[length:]))
    return tuple(int(part) if part.isdigit() else part for part in parts)


def _known(path: KeyPath) -> Any:
    """The type of a setting, or None where the schema has none."""
    try:
        return annotation_at(path)
    except KeyError:
        return None


def _unknown(dotted: str) -> str:
    near = suggest(dotted)
    return f"{dotted} is not a setting" + (f"; did you mean {near}?" if near else "")


def _assign(
    tree: dict[str, Any], given: dict[KeyPath, str], path: KeyPath, value: Any, source: str
) -> Iterator[Problem]:
    dotted = ".".join(map(str, path))
    if section_of(_known(path)) is not None and isinstance(value, dict):
        for key, entry in value.items():
            yield from _assign(tree, given, (*path, key), entry, source)
        return
    place: Any = tree
    for depth, part in enumerate(path[:-1], start=1):
        below: Any = _MISSING
        if isinstance(place, list):
            if not isinstance(part, int) or part >= len(place):
                yield Problem(where=source, text=f"{dotted}: the list has {len(place)} entries")
                return
            below = place[part]
        elif isinstance(place, dict):
            # `algo:` with no line below it is null in YAML and an empty section here.
            if place.get(part) is None:
                place[part] = {}
            below = place[part]
        if not isinstance(below, dict | list):
            parent = ".".join(map(str, path[:depth]))
            yield Problem(where=source, text=f"{dotted} cannot be set: {parent} is {below!r}")
            return
        place = below
    last = path[-1]
    if isinstance(place, list) and (not isinstance(last, int) or last >= len(place)):
        yield Problem(where=source, text=f"{dotted}: the list has {len(place)} entries")
        return
    place[last] = value
    for old in [old for old in given if old[: len(path)] == path]:
        del given[old]
    given[path] = source


def _has(tree: Any, path: KeyPath) -> bool:
    for part in path:
        if isinstance(tree, dict):
            inside = part in tree
        else:
            inside = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not inside:
            return False
        tree = tree[part]
    return True


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value


def _validated(
    tree: dict[str, Any], given: dict[KeyPath, str], name: str, problems: list[Problem]
) -> LoadedConfig:
    usable, odd = _prune(tree, ())
    problems = problems + [Problem(where=_where(given, path, name), text=text) for path, text in odd]
    reported = {path for path, _ in odd}
    try:
        config = Config.model_validate(usable)
    except ValidationError as error:
        for entry in error.errors():
            path = _real_path(usable, entry["loc"])
            if not any(path[: len(known)] == known for known in reported):
                problems.append(Problem(where=_where(given, path, name), text=_told(path, dict(entry))))
        raise _all_of(problems, name) from error
    errors, warnings = cross_checks(config)
    problems += [Problem(where=_where(given, _path_of(key), name), text=text) for key, text in errors]
    if problems:
        raise _all_of(problems, name)
    told = tuple(str(Problem(where=_where(given, _path_of(key), name), text=text)) for key, text in warnings)
    return LoadedConfig(
        config=config, sources=_sources(given), warnings=told, tree=tree, given=given, name=name
    )


def _prune(value: Any, path: KeyPath) -> tuple[Any, list[tuple[KeyPath, str]]]:
    """The tree without what pydantic cannot judge well, and what is wrong with that."""
    annotation = _known(path) if path else Config
    section = section_of(annotation)
    odd: list[tuple[KeyPath, str]] = []
    if isinstance(value, bool) and annotation in (int, float):
        return value, [(path, f"{'.'.join(map(str, path))} should be a number, not {str(value).lower()}")]
    if isinstance(value, Mapping) and section is not None:
        kept = {}
        for key, entry in value.items():
            if key not in section.model_fields:
                odd.append(((*path, key), _unknown(".".join(map(str, (*path, key))))))
            elif entry is None and section_of(section.model_fields[key].annotation) is not None:
                continue  # `algo:` with all its lines commented out is an empty section
            else:
                kept[key], more = _prune(entry, (*path, key))
                odd += more
        return kept, odd
    if isinstance(value, list) and section_of(entry_of(annotation)) is not None:
        pairs = [_prune(entry, (*path, number)) for number, entry in enumerate(value)]
        return [entry for entry, _ in pairs], [item for _, more in pairs for item in more]
    return value, odd


def _real_path(tree: Any, loc: tuple[int | str, ...]) -> KeyPath:
    """pydantic's location without the markers that it adds for keys of mappings."""
    return tuple(part for part in loc if part != "[key]")


def _where(given: Mapping[KeyPath, str], path: KeyPath, name: str) -> str:
    """The place of the nearest thing that was written at or above `path`."""
    for length in range(len(path), 0, -1):
        if path[:length] in given:
            return given[path[:length]]
    return name


def _told(path: KeyPath, error: dict[str, Any]) -> str:
    dotted = ".".join(map(str, path))
    if error["type"] == "missing":
        return f"{dotted} is missing"
    message = str(error["msg"]).replace("Input should", "should", 1)
    message = message.split(", unable to parse")[0].split(", got a number with")[0]
    shown = repr(error["input"])
    hint = ""
    if error["type"] == "string_type" and not isinstance(error["input"], dict | list):
        hint = '; put it in "quotes"'
    return f"{dotted} {message}, not {shown if len(shown) <= 60 else shown[:57] + '...'}{hint}"


def _all_of(problems: Sequence[Problem], name: str) -> ConfigError:
    found = sorted(dict.fromkeys(problems), key=lambda problem: problem.order)
    count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    return ConfigError(
        f"{count} in the configuration ({name}); the first: {found[0]}",
        why="\n       ".join(str(problem) for problem in found),
        fix="change these lines; `docs/config.md` lists every setting with its default",
    )


def _sources(given: Mapping[KeyPath, str]) -> dict[str, str]:
    sources = {}
    for key in leaf_keys():
        if "*" not in key:
            path = _path_of(key)
            if not any(other[: len(path)] == path for other in given):
                sources[key] = "default"
    for path, source in given.items():
        if section_of(_known(path)) is None:
            sources[".".join(map(str, path))] = source
    return sources
