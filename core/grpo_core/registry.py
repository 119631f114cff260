"""Named things that plugins add where nothing has to be negotiated."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, PluginError

KINDS = ("reward", "dataset", "tracker", "advantage", "loss")


@dataclass(slots=True)
class Registry:
    """Tables of rewards, datasets, trackers, advantages and losses, each value with its plugin.

    `owner` is set by the loader while a plugin registers, so that a clash names both sides. A value may
    be a "package.module:attribute" pointer, imported when it is first asked for.
    """

    owner: str = ""
    tables: dict[str, dict[str, tuple[str, Any]]] = field(
        default_factory=lambda: {kind: {} for kind in KINDS}
    )
    closed: bool = False

    def close(self) -> None:
        """Take no more entries; the loader calls it when all plugins were asked."""
        self.closed = True

    def _add(self, kind: str, name: str, obj: Any) -> None:
        if self.closed:
            raise PluginError(
                f"{kind} {name!r} is registered too late",
                why="the registry is closed once the plugins were loaded",
                fix="register it in your plugin's grpo_register",
            )
        taken = self.tables[kind].get(name)
        if taken is not None:
            raise PluginError(
                f"{kind} {name!r} is registered twice",
                why=f"plugins {taken[0]!r} and {self.owner!r} both claim it",
                fix="uninstall one of them or rename the entry in your own plugin",
            )
        self.tables[kind][name] = (self.owner, obj)

    def reward(self, name: str, obj: Any) -> None:
        """Add a reward: `(completion_text, sample) -> float | Awaitable[float]`."""
        self._add("reward", name, obj)

    def dataset(self, name: str, obj: Any) -> None:
        """Add a dataset opener: `(spec, DataConfig) -> Sequence[Sample]`."""
        self._add("dataset", name, obj)

    def tracker(self, name: str, obj: Any) -> None:
        """Add a tracker: `(run_dir, config) -> Tracker`."""
        self._add("tracker", name, obj)

    def advantage(self, name: str, obj: Any) -> None:
        """Add an advantage: `(rewards_N, group_ids_N, AlgoConfig) -> advantages_N`, float64 tensors."""
        self._add("advantage", name, obj)

    def loss(self, name: str, obj: Any) -> None:
        """Add a policy loss: see `grpo_core.algo.loss.PolicyLoss`."""
        self._add("loss", name, obj)

    def get(self, kind: str, name: str) -> Any:
        """The object registered as `name`. Raises `ConfigError` with the nearest name otherwise."""
        table = self.tables[kind]
        if name in table:
            owner, value = table[name]
            return _import_pointer(kind, name, owner, value) if isinstance(value, str) else value
        near = difflib.get_close_matches(name, table, n=1)
        raise ConfigError(
            f"no {kind} is called {name!r}",
            why=f"known: {', '.join(sorted(table)) or 'none'}",
            fix=f"did you mean {near[0]!r}?"
            if near
            else f"use a known {kind}, or install a plugin that has it",
        )


def _import_pointer(kind: str, name: str, owner: str, pointer: str) -> Any:
    module, _, path = pointer.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{kind} {name!r} of plugin {owner!r} cannot be imported from {pointer}",
            why=f"{type(error).__name__}: {error}",
            fix=f"install what it needs, or use another {kind}",
        ) from error
    return value


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the CLI: how its arguments are declared and what runs."""

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(slots=True)
class CommandRegistry:
    """The table of commands that `grpo_commands` fills."""

    commands: dict[str, Command] = field(default_factory=dict)

    def command(
        self,
        name: str,
        help: str,
        configure: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], int],
    ) -> None:
        """Add a command; `run` returns the exit code."""
        if name in self.commands:
            raise PluginError(
                f"command {name!r} exists already",
                why="two plugins, or a plugin and the core, claim the same name",
                fix="rename the command in your plugin",
            )
        self.commands[name] = Command(name, help, configure, run)
