"""Samples from the rows of .jsonl and .parquet files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import ConfigError, DataError
from ..types import Sample

ROLES = ("system", "user", "assistant", "tool")
FILE_OPTIONS = ("limit", "plain")
_ABSENT = object()


def open_jsonl(spec: str, config: DataConfig) -> Sequence[Sample]:
    """One JSON object a line; blank lines are skipped.

    Options: `limit` (first rows only), `plain` (prompts that are strings go to the model as they are,
    without a chat template: for base models). Raises `DataError` with the file and line.
    """
    path = _existing(spec)
    return _samples(path, config, _json_rows(path))


def open_parquet(spec: str, config: DataConfig) -> Sequence[Sample]:
    """One sample a row; the same options. Raises `DataError` with the file and row."""
    path = _existing(spec)
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(
            f"{spec} cannot be read",
            why="reading .parquet needs the package pyarrow, which is not installed",
            fix='pip install "grpo-core[parquet]"',
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise DataError(
            f"{spec} is not a usable .parquet file",
            why=str(error).splitlines()[0],
            fix="write the file again; a download may have been cut",
        ) from error
    return _samples(path, config, ((f"row {number}", row) for number, row in enumerate(rows)))


def check_options(spec: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises `ConfigError` for an option that the dataset does not have."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"dataset {spec!r} has no option {name!r}",
                why=f"its options are: {', '.join(known)}",
                fix=f"did you mean {near[0]}?" if near else "remove it from data.options",
            )


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise DataError(
            f"{spec} does not exist" if not path.exists() else f"{spec} is not a file",
            why=f"looked for {path.absolute()}",
            fix="mend the path in data.train or data.eval; it is relative to where grpo was started",
        )
    return path


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Lines end at \n only: U+2028 and the like may stand inside a JSON string.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield f"line {number}", json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number} is not valid JSON",
                why=f"{error}; the line starts with {raw[:60]!r}",
                fix="write one JSON object on each line (.jsonl)",
            ) from error


def _samples(path: Path, config: DataConfig, rows: Iterator[tuple[str, Any]]) -> Sequence[Sample]:
    check_options(str(path), config.options, FILE_OPTIONS)
    limit = config.options.get("limit")
    plain = config.options.get("plain", False)
    if (limit is not None and (type(limit) is not int or limit < 1)) or type(plain) is not bool:
        raise ConfigError(
            f"options of {path} are wrong",
            why=f"limit is {limit!r} and plain is {plain!r}",
            fix="limit is a number from 1 (rows that are used), plain is true or false",
        )
    samples: list[Sample] = []
    for where, row in rows:
        if limit is not None and len(samples) == limit:
            break
        place = f"{path}:{where.removeprefix('line ')}" if where.startswith("line") else f"{path}, {where},"
        samples.append(
            _sample(place, f"{path.name}:{where.rpartition(' ')[2]}", path.stem, row, config, plain)
        )
    return tuple(samples)


def _sample(place: str, ident: str, source: str, row: Any, config: DataConfig, plain: bool) -> Sample:
    if not isinstance(row, Mapping):
        raise _unusable(place, f"it is a {type(row).__name__}, not an object with columns")
    prompt = _column(place, row, config.prompt_key, "data.prompt_key")
    answer = None
    if config.answer_key:
        answer = _answer(place, config.answer_key, _column(place, row, config.answer_key, "data.answer_key"))
    used = (config.prompt_key, config.answer_key)
    extra = {name: value for name, value in row.items() if name not in used}
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _unusable(place, f"its {config.prompt_key} is empty")
        if plain:
            return Sample(id=ident, text=prompt, answer=answer, source=source, extra=extra)
        prompt = [{"role": "user", "content": prompt}]
    messages = _messages(place, config.prompt_key, prompt)
    return Sample(id=ident, messages=messages, answer=answer, source=source, extra=extra)


def _column(place: str, row: Mapping[str, Any], key: str, setting: str) -> Any:
    """The value of a column; `a.b` also reaches into a column that holds an object."""
    value: Any = row.get(key, _ABSENT)
    if value is _ABSENT and "." in key:
        value = row
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    if value is not _ABSENT:
        return value
    near = difflib.get_close_matches(key, list(row), n=1)
    hint = f"; did you mean {setting}={near[0]}?" if near else ""
    none = ' or "" when no reward needs an answer' if setting == "data.answer_key" else ""
    raise DataError(
        f"{place} has no column {key!r}",
        why=f"its columns are: {', '.join(map(str, row)) or 'none'}",
        fix=f"set {setting} to one of them{none}{hint}",
    )


def _answer(place: str, key: str, value: Any) -> str:
    if value is None:
        raise _unusable(place, f"its {key} is null, so no completion could be told right from wrong")
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _messages(place: str, key: str, prompt: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(prompt, list) or not prompt:
        raise _unusable(
            place, f"its {key} is neither a text nor a list of chat messages: {str(prompt)[:60]!r}"
        )
    messages = []
    for turn in prompt:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise _unusable(
                place,
                f"a chat message of its {key} is {str(turn)[:60]!r}; it needs a role ({', '.join(ROLES)})"
                " and a content that is a text",
            )
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] == "assistant":
        raise _unusable(place, f"its {key} ends with the assistant's turn, which the model is to write")
    return tuple(messages)


def _unusable(place: str, why: str) -> DataError:
    return DataError(f"{place} cannot be used", why=why, fix="mend that row or remove it")
