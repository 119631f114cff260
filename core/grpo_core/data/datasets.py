"""Open a dataset: a .jsonl or .parquet file, `reasoning-gym:<task>`, or a name that a plugin registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from ..config import DataConfig
from ..errors import ConfigError, DataError
from ..registry import Registry
from ..types import Sample
from .rows import open_jsonl, open_parquet

FILES: Mapping[str, Callable[[str, DataConfig], Sequence[Sample]]] = {
    ".jsonl": open_jsonl,
    ".parquet": open_parquet,
}


class LazySamples(Sequence[Sample]):
    """Samples made when they are asked for; the same index gives an equal sample every time."""

    def __init__(self, size: int, make: Callable[[int], Sample]) -> None:
        self._size = size
        self._make = make

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        places = range(self._size)[index]
        if isinstance(places, range):
            return [self._make(place) for place in places]
        return self._make(places)


def open_dataset(spec: str, config: DataConfig, registry: Registry, split: str) -> Sequence[Sample]:
    """The samples of `spec`, with `data.system` and `data.suffix` applied.

    `split` is "train" or "eval" and chooses between `data.options` and `data.eval_options`. An opener
    that a plugin registered as `name` serves `name` and `name:<anything>`, and gets the whole spec and
    a config whose `options` are those of the split.

    Raises `DataError` for a dataset that is missing, empty or has a row that cannot be used (with the file
    and line), `ConfigError` for options that it does not have.
    """
    if split == "eval":
        config = config.model_copy(update={"options": config.eval_options})
    opener = FILES.get(Path(spec).suffix.lower())
    if opener is None:
        opener = _registered(spec, registry)
    samples = opener(spec, config)
    if len(samples) == 0:
        raise DataError(
            f"data.{split} {spec!r} is empty",
            why="it has no row, so there is nothing to train on or to evaluate",
            fix="give a dataset with one row at least",
        )
    return LazySamples(len(samples), lambda index: dress(samples[index], config))


def _registered(spec: str, registry: Registry) -> Callable[[str, DataConfig], Sequence[Sample]]:
    name = spec.partition(":")[0]
    try:
        opener: Callable[[str, DataConfig], Sequence[Sample]] = registry.get("dataset", name)
    except ConfigError as error:
        raise DataError(
            f"no dataset is called {spec!r}",
            why=f"it does not end in .jsonl or .parquet, and of registered names there are: "
            f"{', '.join(sorted(registry.tables['dataset'])) or 'none'}",
            fix="give the path of a file, `reasoning-gym:<task>`, or a registered name",
        ) from error
    return opener


def dress(sample: Sample, config: DataConfig) -> Sample:
    """The sample with the system message before it and the suffix after each user message."""
    if not sample.messages:
        return replace(sample, text=sample.text + config.suffix) if config.suffix else sample
    messages = list(sample.messages)
    if config.suffix:
        messages = [
            {**message, "content": message["content"] + config.suffix}
            if message["role"] == "user"
            else message
            for message in messages
        ]
    if config.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
    return replace(sample, messages=tuple(messages))
