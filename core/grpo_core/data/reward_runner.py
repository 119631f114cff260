"""Score completions with all rewards of a run."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType

from ..config import RewardConfig
from ..errors import ConfigError, RewardError
from ..registry import Registry
from ..types import Sample
from .reward_pool import Pool
from .reward_protocol import RewardFn, Setup, as_number, attempt, check_call, is_async, told
from .rewards import HOSTILE, PACKAGES, QUICK, regex

HOSTILE_MEMORY_BYTES = 2 << 30
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class RewardRunner:
    """The rewards of a run. Quick built-in ones are called directly, all others run in worker processes.

    A reward that raises, hangs or returns something that is not a finite number stops the run with a
    `RewardError`. Rewards that evaluate what the model wrote (math, reasoning_gym) are another matter: if
    a completion makes them hang, crash or run out of memory, it scores 0 and is counted in `failures`.
    """

    def __init__(self, configs: Sequence[RewardConfig], registry: Registry, *, workers: int = 0) -> None:
        self.labels = tuple(_labels(configs))
        self.weights = {label: config.weight for label, config in zip(self.labels, configs, strict=True)}
        self.failures: dict[str, int] = dict.fromkeys(self.labels, 0)
        self._direct: dict[str, tuple[RewardFn, RewardConfig]] = {}
        self._pools: dict[str, Pool] = {}
        size = workers or max(1, min(4, os.cpu_count() or 1))
        setups = {}
        for label, config in zip(self.labels, configs, strict=True):
            function = None if _TARGET.fullmatch(config.name) else _named(config, registry)
            setup = _setup(function, config)
            if setup is None and function is not None:
                self._direct[label] = (function, config)
            elif setup is not None:
                setups[label] = setup
        self._pools = {label: Pool(label, setup, size) for label, setup in setups.items()}

    def check(self) -> None:
        """Wait until every reward can be called. Raises `RewardError` for one that cannot be loaded."""
        for pool in self._pools.values():
            pool.check()

    def score(self, pairs: Sequence[tuple[str, Sample]]) -> list[dict[str, float]]:
        """The value of each reward, by its label, for each (completion text, sample).

        Raises `RewardError` that names the reward, the sample and how the completion starts.
        """
        rows: list[dict[str, float]] = [{} for _ in pairs]
        for label in self.labels:
            if label in self._direct:
                for row, value in zip(rows, self._call(label, pairs), strict=True):
                    row[label] = value
                continue
            plain = [(text, _sendable(sample)) for text, sample in pairs]
            for result in self._pools[label].score(plain):
                text, sample = pairs[result.number]
                if result.excused:
                    self.failures[label] += 1
                elif result.error:
                    raise _failed(label, sample, text, result.error)
                rows[result.number][label] = result.value
        return rows

    def take_failures(self) -> dict[str, int]:
        """Excused completions by label since this was last called."""
        taken, self.failures = self.failures, dict.fromkeys(self.labels, 0)
        return taken

    def total(self, values: Mapping[str, float]) -> float:
        """The weighted sum of one row of `score`."""
        total = 0.0
        for label, value in values.items():
            total += self.weights[label] * value
        return total

    def close(self) -> None:
        """End the worker processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools = {}

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, label: str, pairs: Sequence[tuple[str, Sample]]) -> list[float]:
        function, config = self._direct[label]
        values: list[float] = []

        def call() -> None:
            for text, sample in pairs:
                values.append(as_number(function(text, sample, **config.options)))

        error = attempt(call)[1]
        if error is not None:
            text, sample = pairs[len(values)]
            raise _failed(label, sample, text, told(error))
        return values


def _labels(configs: Sequence[RewardConfig]) -> list[str]:
    """Names of rewards; the second `regex` is `regex_2`."""
    labels: list[str] = []
    for config in configs:
        same = sum(earlier.name == config.name for earlier in configs[: len(labels)])
        labels.append(f"{config.name}_{same + 1}" if same else config.name)
    return labels


def _named(config: RewardConfig, registry: Registry) -> RewardFn:
    function: RewardFn = registry.get("reward", config.name)
    package, pip = PACKAGES.get(function, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"reward {config.name!r} cannot be used",
            why=f"it needs {package}, which is not installed",
            fix=pip,
        )
    try:
        check_call(function, config.options)
    except TypeError as error:
        raise ConfigError(
            f"reward {config.name!r} does not accept its options",
            why=f"{error}; given were: {', '.join(config.options) or 'none'}",
            fix="mend the options of this entry of rewards",
        ) from error
    if function is regex:
        _check_pattern(config)
    return function


def _check_pattern(config: RewardConfig) -> None:
    pattern = config.options["pattern"]
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"the pattern of reward {config.name!r} is not a regular expression",
            why=f"{pattern!r}: {error}",
            fix="mend rewards[].options.pattern; in YAML put it in 'single quotes'",
        ) from error


def _setup(function: RewardFn | None, config: RewardConfig) -> Setup | None:
    """How a worker gets the function; None for one that is called directly."""
    pickled = b""
    if function is not None:
        if function in QUICK:
            return None
        data, error = attempt(lambda: pickle.dumps(function))
        # What cannot be found by its name in another process can only be called in this one.
        if error is not None or getattr(function, "__module__", "") == "__main__":
            if is_async(function):
                raise ConfigError(
                    f"reward {config.name!r} cannot be used",
                    why="it is async and cannot be found by its name in a worker process",
                    fix="define it at the top of an importable module",
                )
            return None
        pickled = data
    hostile = function is not None and function in HOSTILE
    return Setup(
        target="" if function is not None else config.name,
        pickled=pickled,
        options=dict(config.options),
        timeout=config.timeout,
        # The console script's own path lacks the folder that the user stands in; last, so it shadows nothing.
        path=(*sys.path, os.getcwd()),
        hostile=hostile,
        memory_bytes=HOSTILE_MEMORY_BYTES if hostile else 0,
    )


def _sendable(sample: Sample) -> Sample:
    """The sample with plain dicts: read-only views cannot be pickled."""
    return replace(sample, messages=tuple(dict(turn) for turn in sample.messages), extra=dict(sample.extra))


def _failed(label: str, sample: Sample, text: str, error: str) -> RewardError:
    start = text if len(text) <= 80 else text[:77] + "..."
    return RewardError(
        f"reward {label!r} failed on sample {sample.id!r}",
        why=f"{error}; the completion starts with {start!r}",
        fix="mend the function or raise its timeout, then continue with `grpo train --resume <run folder>`",
    )
