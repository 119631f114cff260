"""From a YAML file, a model's recipe and `key=value` overrides to a `Config`, or to all errors at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .config import Config
from .config_checks import cross_checks
from .config_layers import Problem, assign, copy_tree, has, known, lay_override, path_of, prune, unknown
from .config_schema import leaf_keys, section_of
from .errors import ConfigError
from .yaml_source import KeyPath, dump, parse_yaml

if TYPE_CHECKING:
    from .model.plugin import Advice


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A valid configuration and where each of its values comes from."""

    config: Config
    sources: Mapping[str, str]
    """Dotted key -> "default", "recipe of <family>: <why>", "<file>:<line>" or "command line"."""
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
        problems.extend(lay_override(tree, given, override))
    return _validated(tree, given, name, problems)


def merge_recipe(loaded: LoadedConfig, recipe: Mapping[str, Advice], family: str) -> LoadedConfig:
    """`loaded` with a model family's defaults (by dotted key) below the file and the overrides.

    Raises `ConfigError` for a recipe with a key or value that the schema does not know.
    """
    tree = copy_tree(loaded.tree)
    given = dict(loaded.given)
    problems = []
    for dotted, advice in recipe.items():
        path = path_of(dotted)
        if known(path) is None:
            problems.append(Problem(where=f"recipe of {family}", text=unknown(dotted)))
        elif not has(tree, path):
            source = f"recipe of {family}: {advice.why}"
            problems.extend(assign(tree, given, path, advice.value, source))
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


def _validated(
    tree: dict[str, Any], given: dict[KeyPath, str], name: str, problems: list[Problem]
) -> LoadedConfig:
    usable, odd = prune(tree, ())
    problems = problems + [Problem(where=_where(given, path, name), text=text) for path, text in odd]
    reported = {path for path, _ in odd}
    try:
        config = Config.model_validate(usable)
    except ValidationError as error:
        for entry in error.errors():
            path = tuple(part for part in entry["loc"] if part != "[key]")
            if not any(path[: len(told)] == told for told in reported):
                problems.append(Problem(where=_where(given, path, name), text=_told(path, dict(entry))))
        raise _all_of(problems, name) from error
    errors, warnings = cross_checks(config)
    problems += [Problem(where=_where(given, path_of(key), name), text=text) for key, text in errors]
    if problems:
        raise _all_of(problems, name)
    told = tuple(str(Problem(where=_where(given, path_of(key), name), text=text)) for key, text in warnings)
    return LoadedConfig(
        config=config, sources=_sources(given), warnings=told, tree=tree, given=given, name=name
    )


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
        fix="change these lines; `docs/configuration.md` lists every setting with its default",
    )


def _sources(given: Mapping[KeyPath, str]) -> dict[str, str]:
    sources = {}
    for key in leaf_keys():
        if "*" not in key:
            path = path_of(key)
            if not any(other[: len(path)] == path for other in given):
                sources[key] = "default"
    for path, source in given.items():
        if section_of(known(path)) is None:
            sources[".".join(map(str, path))] = source
    return sources
