"""Procedural tasks of reasoning-gym (Stojanovski et al. 2025), with the task's own scoring."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, overload

from ..config import DataConfig
from ..errors import DataError
from ..types import Sample
from .rows import check_options

DEFAULT_SIZE = 1000


class GymSamples(Sequence[Sample]):
    """The samples of one task; entry i is generated from (task, options, i) when it is asked for."""

    def __init__(self, task: str, options: Mapping[str, Any]) -> None:
        self.task = task
        self.options = {"size": DEFAULT_SIZE, "seed": 0, **options}
        self._entries = _task(task, json.dumps(self.options, sort_keys=True))

    def __len__(self) -> int:
        return int(self.options["size"])

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self._sample(place) for place in places]
        return self._sample(places)

    def _sample(self, index: int) -> Sample:
        entry = self._entries[index]
        answer = entry["answer"]
        return Sample(
            id=f"{self.task}:{index}",
            messages=({"role": "user", "content": str(entry["question"])},),
            answer=None if answer is None else str(answer),
            source=self.task,
            extra={"task": self.task, "options": self.options, "index": index},
        )


def open_gym(spec: str, config: DataConfig) -> GymSamples:
    """`reasoning-gym:<task>`; options: `size` (default 1000), `seed` (default 0) and the task's own.

    Raises `DataError` when the package or the task is missing or an option has a wrong value,
    `ConfigError` for an option that the task does not have.
    """
    task = spec.partition(":")[2]
    tables = _factory(spec).DATASETS
    if task not in tables:
        import difflib

        near = difflib.get_close_matches(task, tables, n=3, cutoff=0.5)
        raise DataError(
            f"reasoning-gym has no task {task!r}",
            why=f"it has {len(tables)} tasks, among them: {', '.join(near or sorted(tables)[:8])}",
            fix=f"did you mean reasoning-gym:{near[0]}?" if near else "see its gallery of tasks",
        )
    check_options(spec, config.options, [field.name for field in dataclasses.fields(tables[task][1])])
    size = config.options.get("size", DEFAULT_SIZE)
    try:
        if type(size) is not int or size < 1:
            raise ValueError(f"size is {size!r}, not a number from 1")
        return GymSamples(task, config.options)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(
            f"{spec} does not accept its options",
            why=str(error) or "a check of the task failed",
            fix=f"mend data.options; given were {dict(config.options)}",
        ) from error


def gym_score(text: str, sample: Sample) -> float:
    """The task's own score in [0, 1] of the answer in `text`: what stands in <answer> tags, else all of it.

    The entry is generated again from the sample's task, options and index, so that it can be scored in
    another process.
    """
    extra = sample.extra
    entries = _task(extra["task"], json.dumps(extra["options"], sort_keys=True))
    _, opened, inner = text.rpartition("<answer>")
    answer = inner.partition("</answer>")[0] if opened else text
    return float(entries.score_answer(answer.strip(), entries[extra["index"]]))


def _factory(spec: str) -> ModuleType:
    try:
        import reasoning_gym  # noqa: F401  importing it fills the table of tasks
        from reasoning_gym import factory
    except ImportError as error:
        raise DataError(
            f"{spec} cannot be opened",
            why="the package reasoning-gym is not installed",
            fix='pip install "grpo-core[quickstart]"',
        ) from error
    return factory  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def _task(task: str, options: str) -> Any:
    return _factory(task).create_dataset(task, **json.loads(options))
