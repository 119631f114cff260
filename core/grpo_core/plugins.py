"""Finding plugins and asking their hooks, once.

One broken plugin never stops the others: whatever goes wrong becomes a `Failure` with its plugin, place
and fix. Plugins come in the order core, bundled, then the rest by distribution and name, whatever was
installed first.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .catalogue import Catalogue, Failure, Offer, PluginInfo
from .errors import ConfigError
from .ops.contract import CONTRACTS, Contract
from .plugin_checks import device_problem, did_you_mean, impl_problem, model_problem
from .registry import Command, CommandRegistry, Registry

__all__ = ["Catalogue", "Failure", "Offer", "PluginInfo", "Raised", "attempt", "load"]

GROUP = "grpo.plugins"
BUNDLED = "grpo-core"
"""Distribution whose plugins come first: installing another package cannot take their names."""
CORE = "core"
CORE_COMMANDS = ("train", "plan", "plugins", "doctor", "report", "new-plugin")
"""Commands of the core's own command line, closed to plugins."""
HOOKS = tuple(sorted(name for name in vars(hookspecs) if name.startswith("grpo_")))

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Raised:
    """What `attempt` returns in place of a value."""

    error: BaseException
    trace: str

    def __str__(self) -> str:
        text = str(self.error).strip()
        return f"{type(self.error).__name__}: {text}" if text else type(self.error).__name__


def attempt(call: Callable[[], T]) -> T | Raised:
    """Run code of a plugin; whatever it raises becomes data.

    For importing a plugin, asking a hook, a `when` or a probe; never around an op.
    """
    try:
        return call()
    # The one broad except of the project: foreign code may raise anything, a plugin that calls
    # sys.exit() while it is imported included, and one broken plugin must not stop the others.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return Raised(error, "".join(traceback.format_exception(error)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A plugin that was found, not yet imported."""

    name: str
    distribution: str
    version: str
    target: str
    load: Callable[[], object]

    @property
    def order(self) -> tuple[bool, bool, str, str, str]:
        bundled = self.distribution == BUNDLED
        return (not (bundled and self.name == CORE), not bundled, self.distribution, self.name, self.target)

    @property
    def source(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(slots=True)
class _Tables:
    """The catalogue while it is filled."""

    contracts: Mapping[str, Contract]
    plugins: list[PluginInfo] = field(default_factory=list)
    offers: dict[str, dict[str, Offer]] = field(default_factory=dict)
    devices: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    registry: Registry = field(default_factory=Registry)
    commands: dict[str, Command] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, entry: _Entry, where: str, error: object, fix: str = "") -> None:
        """Record a failure of one plugin."""
        self.failures.append(
            Failure(
                plugin=entry.name,
                distribution=entry.source,
                where=where,
                error=str(error),
                fix=fix or f"update {entry.distribution}, or set plugins_off: [{entry.name}]",
                trace=error.trace if isinstance(error, Raised) else "",
            )
        )


def load(
    *,
    off: Collection[str] = (),
    extra: Mapping[str, object] | None = None,
    contracts: Mapping[str, Contract] = CONTRACTS,
) -> Catalogue:
    """Load every plugin of the group `grpo.plugins` but those in `off`, and ask all their hooks.

    `extra` adds objects with hook implementations by plugin id, for tests and notebooks.
    Raises `ConfigError` when `off` names the core or a plugin that is not installed.
    """
    tables = _Tables(contracts)
    entries = sorted(_installed() + _in_memory(extra or {}), key=lambda entry: entry.order)
    _check_off(off, {entry.name for entry in entries})
    taken: dict[str, _Entry] = {}
    for entry in entries:
        if entry.name in off:
            continue
        winner = taken.setdefault(entry.name, entry)
        if winner is entry:
            _load_one(entry, tables)
        else:
            tables.fail(
                entry,
                "name",
                f"the name {entry.name!r} is claimed by {winner.source} ({winner.target}) and by "
                f"{entry.source} ({entry.target}); the first is used",
                f"uninstall {winner.distribution} or {entry.distribution}",
            )
    return _freeze(tables, tuple(sorted(off)))


def _installed() -> list[_Entry]:
    found = []
    for point in metadata.entry_points(group=GROUP):
        dist = point.dist
        name = dist.name.lower().replace("_", "-").replace(".", "-") if dist else "unknown"
        version = dist.version if dist else ""
        found.append(
            _Entry(name=point.name, distribution=name, version=version, target=point.value, load=point.load)
        )
    return found


def _in_memory(extra: Mapping[str, object]) -> list[_Entry]:
    def entry(name: str, plugin: object) -> _Entry:
        target = getattr(plugin, "__name__", type(plugin).__name__)
        return _Entry(name=name, distribution="in-memory", version="", target=target, load=lambda: plugin)

    return [entry(name, plugin) for name, plugin in extra.items()]


def _check_off(off: Collection[str], names: Collection[str]) -> None:
    for name in off:
        if name == CORE:
            raise ConfigError(
                "plugins_off names the core",
                why="nothing runs without its reference ops",
                fix="take 'core' out of plugins_off",
            )
        if name not in names:
            raise ConfigError(
                f"plugins_off names {name!r}, which is not installed{did_you_mean(name, names)}",
                why=f"installed: {', '.join(sorted(names))}",
                fix="take it out of plugins_off, or write the name that `grpo plugins` shows",
            )


def _load_one(entry: _Entry, tables: _Tables) -> None:
    plugin = attempt(entry.load)
    if isinstance(plugin, Raised):
        missing = plugin.error.name if isinstance(plugin.error, ModuleNotFoundError) else None
        fix = f"install what provides {missing!r}, or set plugins_off: [{entry.name}]" if missing else ""
        tables.fail(entry, "import", plugin, fix)
        return
    # A manager for each plugin: one that fails half-way leaves nothing behind for the others.
    manager = pluggy.PluginManager("grpo")
    manager.add_hookspecs(hookspecs)
    outcome = attempt(lambda: manager.register(plugin, name=entry.name))
    if isinstance(outcome, Raised):
        fix = f"update {entry.distribution} or grpo-core, or set plugins_off: [{entry.name}]"
        tables.fail(entry, "register", outcome, fix)
        return
    asked = _usable_hooks(entry, manager, plugin, tables)
    _check_unmarked(entry, plugin, tables)
    hooks = tuple(name for name, _ in asked)
    tables.plugins.append(
        PluginInfo(
            id=entry.name,
            distribution=entry.distribution,
            version=entry.version,
            module=entry.target,
            hooks=hooks,
        )
    )
    if not hooks:
        tables.fail(
            entry, "register", "it implements no hook", "mark its functions with grpo_core's @hookimpl"
        )
    for name, implementation in asked:
        _ask(entry, name, implementation, tables)


def _usable_hooks(
    entry: _Entry, manager: pluggy.PluginManager, plugin: object, tables: _Tables
) -> list[tuple[str, pluggy.HookImpl]]:
    usable = []
    for caller in sorted(manager.get_hookcallers(plugin) or [], key=lambda caller: caller.name):
        for implementation in caller.get_hookimpls():
            if not caller.has_spec():
                if not implementation.optionalhook:
                    tables.fail(entry, caller.name, f"unknown hook{did_you_mean(caller.name, HOOKS)}")
            elif implementation.wrapper or implementation.hookwrapper:
                tables.fail(entry, caller.name, "hooks are answered with data; a wrapper is never called")
            else:
                usable.append((caller.name, implementation))
    return usable


def _check_unmarked(entry: _Entry, plugin: object, tables: _Tables) -> None:
    """pluggy passes over a function without the marker in silence; here it is a failure."""
    if not isinstance(plugin, ModuleType):
        return
    for name, value in vars(plugin).items():
        own = getattr(value, "__module__", None) == plugin.__name__
        if name.startswith("grpo_") and callable(value) and own and not hasattr(value, "grpo_impl"):
            hint = "" if name in HOOKS else f", and no such hook exists{did_you_mean(name, HOOKS)}"
            tables.fail(entry, name, f"it is not marked with @hookimpl{hint}", "mark or rename the function")


def _ask(entry: _Entry, hook: str, implementation: pluggy.HookImpl, tables: _Tables) -> None:
    if hook == "grpo_register":
        _ask_register(entry, implementation, tables)
        return
    if hook == "grpo_commands":
        _ask_commands(entry, implementation, tables)
        return
    answers = attempt(lambda: _listed(implementation.function()))
    if isinstance(answers, Raised):
        tables.fail(entry, hook, answers)
        return
    take = {"grpo_devices": _take_device, "grpo_models": _take_model}.get(hook, _take_offer)
    for answer in answers:
        problem = take(entry, hook, answer, tables)
        if problem:
            tables.fail(entry, hook, problem)


def _listed(answer: Any) -> list[object]:
    """All of an answer, so that what a generator raises is raised while asking."""
    return list(answer)


def _take_offer(entry: _Entry, hook: str, answer: Any, tables: _Tables) -> str | None:
    problem = impl_problem(answer, hook.removeprefix("grpo_"), tables.contracts)
    if problem:
        return problem
    offer = Offer(plugin=entry.name, impl=answer)
    if tables.offers.setdefault(answer.op, {}).setdefault(offer.id, offer) is not offer:
        return f"offers {answer.op} twice as {offer.id}; the first is used"
    return None


def _take_device(entry: _Entry, hook: str, answer: Any, tables: _Tables) -> str | None:
    return device_problem(answer) or _take_named(entry, "device", tables.devices, answer, tables)


def _take_model(entry: _Entry, hook: str, answer: Any, tables: _Tables) -> str | None:
    problem = model_problem(answer)
    if problem:
        return problem
    for model in tables.models.values():
        both = set(model.architectures) & set(answer.architectures)
        if both:
            first = tables.owners[f"model:{model.name}"]
            return (
                f"family {answer.name!r} claims {', '.join(sorted(both))}, which {first!r} serves already; "
                f"the first is used (plugins_off: [{first}] would free it)"
            )
    return _take_named(entry, "model", tables.models, answer, tables)


def _take_named(entry: _Entry, kind: str, table: dict[str, Any], answer: Any, tables: _Tables) -> str | None:
    if answer.name in table:
        owner = tables.owners[f"{kind}:{answer.name}"]
        return f"{kind} {answer.name!r} is brought by plugin {owner!r} already; the first is used"
    table[answer.name] = answer
    tables.owners[f"{kind}:{answer.name}"] = entry.name
    return None


def _ask_register(entry: _Entry, implementation: pluggy.HookImpl, tables: _Tables) -> None:
    own = Registry(owner=entry.name)
    outcome = _call_with(implementation, own)
    if isinstance(outcome, Raised):
        tables.fail(entry, "grpo_register", outcome)
        return
    for kind, table in own.tables.items():
        for name, value in table.items():
            taken = tables.registry.tables[kind].get(name)
            if taken:
                tables.fail(
                    entry, "grpo_register", f"{kind} {name!r} is registered by {taken[0]!r}; that one is used"
                )
            else:
                tables.registry.tables[kind][name] = value


def _ask_commands(entry: _Entry, implementation: pluggy.HookImpl, tables: _Tables) -> None:
    own = CommandRegistry()
    outcome = _call_with(implementation, own)
    if isinstance(outcome, Raised):
        tables.fail(entry, "grpo_commands", outcome)
        return
    for name, command in own.commands.items():
        if name in CORE_COMMANDS or name in tables.commands:
            owner = tables.owners.get(f"command:{name}", CORE)
            tables.fail(entry, "grpo_commands", f"command {name!r} belongs to {owner!r}; that one is used")
        else:
            tables.commands[name] = command
            tables.owners[f"command:{name}"] = entry.name


def _call_with(implementation: pluggy.HookImpl, argument: object) -> object | Raised:
    """Call a hook of one argument; an implementation may leave the argument out."""
    return attempt(lambda: implementation.function(*[argument for _ in implementation.argnames]))


def _freeze(tables: _Tables, off: tuple[str, ...]) -> Catalogue:
    offers: Iterable[tuple[str, Sequence[Offer]]] = (
        (op, [by_id[key] for key in sorted(by_id)]) for op, by_id in sorted(tables.offers.items())
    )
    tables.registry.close()
    return Catalogue(
        plugins=tuple(tables.plugins),
        offers=MappingProxyType({op: tuple(listed) for op, listed in offers}),
        devices=MappingProxyType(tables.devices),
        models=MappingProxyType(tables.models),
        registry=tables.registry,
        commands=MappingProxyType(tables.commands),
        owners=MappingProxyType(tables.owners),
        failures=tuple(tables.failures),
        off=off,
    )


def broken_plugins(catalogue: Catalogue) -> str:
    """The failures in one line for an error's `why`; empty when there are none."""
    return "; ".join(str(failure) for failure in catalogue.failures)
