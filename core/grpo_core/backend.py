"""The bound plan: plain callables in frozen slots, imported and checked here, once.

A bound call is two attribute loads more than a direct one; no dispatcher, no hook, no try on the way.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import backend_slots as slots
from .errors import PluginError
from .ops.contract import CONTRACTS, Contract
from .plan import Choice, Plan
from .plugins import Raised, attempt
from .signatures import mismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The ops of a run: `backend.attention.varlen(...)`."""

    attention: slots.AttentionOps
    mla: slots.MlaOps
    gated_delta: slots.GatedDeltaOps
    short_conv: slots.ShortConvOps
    moe: slots.MoeOps
    norm: slots.NormOps
    rope: slots.RopeOps
    mlp: slots.MlpOps
    linear: slots.LinearOps
    sample: slots.SampleOps
    loss: slots.LossOps
    optim: slots.OptimOps
    memory: slots.MemoryOps
    comm: slots.CommOps
    engine: slots.EngineOps


NAMESPACES: Mapping[str, Callable[..., Any]] = {
    "attention": slots.AttentionOps,
    "mla": slots.MlaOps,
    "gated_delta": slots.GatedDeltaOps,
    "short_conv": slots.ShortConvOps,
    "moe": slots.MoeOps,
    "norm": slots.NormOps,
    "rope": slots.RopeOps,
    "mlp": slots.MlpOps,
    "linear": slots.LinearOps,
    "sample": slots.SampleOps,
    "loss": slots.LossOps,
    "optim": slots.OptimOps,
    "memory": slots.MemoryOps,
    "comm": slots.CommOps,
    "engine": slots.EngineOps,
}


def bind(plan: Plan, *, contracts: Mapping[str, Contract] = CONTRACTS) -> Backend:
    """Import every pointer of the plan and check its signature against the op's Protocol.

    Raises `PluginError` for a pointer that cannot be imported, a signature that does not fit, or an op
    that the plan leaves out; nothing has run by then.
    """
    rows = {row.op: row for row in plan.choices}
    bound: dict[str, Any] = {}
    for op, contract in contracts.items():
        row = rows.get(op)
        if row is not None and row.chosen is not None:
            bound[op] = _bind_row(row, contract)
        elif contract.reference is None:
            bound[op] = None
        elif row is not None:
            bound[op] = _unserved(row)
        else:
            bound[op] = _unserved(Choice(op=op, chosen=None, load="", reason="this model does not need it"))
    return _backend(bound)


def reference_backend() -> Backend:
    """The references of core, for tests and as the oracle of other backends; it has no engines."""
    bound: dict[str, Any] = {}
    for op, contract in CONTRACTS.items():
        if op.startswith("engine."):
            bound[op] = _NoEngine
        elif contract.reference is None:
            bound[op] = None
        else:
            row = Choice(
                op=op, chosen="core:reference", load=contract.reference, reason="reference",
                contract=contract.version,
            )  # fmt: skip
            bound[op] = _bind_row(row, contract)
    return _backend(bound)


def _backend(bound: Mapping[str, Any]) -> Backend:
    groups = {}
    for namespace, make in NAMESPACES.items():
        names = [field.name for field in fields(make)]  # type: ignore[arg-type]
        groups[namespace] = make(**{name: bound[f"{namespace}.{name}"] for name in names})
    return Backend(**groups)


def _bind_row(row: Choice, contract: Contract) -> Any:
    served = attempt(lambda: import_pointer(row.load))
    if isinstance(served, Raised):
        raise PluginError(
            f"{row.op}: {row.chosen} cannot be imported from {row.load}",
            why=str(served),
            fix=f"mend the installation of plugin {_plugin(row)!r}, or pin another offer under `ops:`",
        ) from served.error
    older = frozenset(name for name, (version, _) in contract.added.items() if row.contract < version)
    problem = mismatch(served, import_pointer(contract.protocol), contract.kind, leave_out=older)
    if problem:
        raise PluginError(
            f"{row.op}: {row.chosen} ({row.load}) does not have the contract's signature",
            why=problem,
            fix=f"update plugin {_plugin(row)!r} or grpo-core, or pin another offer under `ops:`",
        )
    if not older:
        return served
    return adapt(served, row, {name: contract.added[name][1] for name in older}, contract.hints)


def _plugin(row: Choice) -> str:
    return (row.chosen or "").partition(":")[0]


def import_pointer(pointer: str) -> Any:
    """The object behind "package.module:attribute.path"."""
    module, _, path = pointer.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def adapt(
    function: Callable[..., Any], row: Choice, neutral: Mapping[str, object],
    hints: Collection[str] = (),
) -> Callable[..., Any]:  # fmt: skip
    """An offer of an older contract behind the newer signature: it serves the neutral values only, and is not
    told of hints."""

    @functools.wraps(function)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        for name, value in neutral.items():
            given = kwargs.pop(name, value)
            # Tensors compare by element; a neutral value is None, a flag or a number.
            if name in hints:
                continue
            if given is not value and not (isinstance(given, bool | int | float) and given == value):
                raise PluginError(
                    f"{row.op}: {row.chosen} cannot serve {name}={given!r}",
                    why=f"it was written for contract {row.contract}, before {name} was added",
                    fix=f"update plugin {_plugin(row)!r}, or pin another offer under `ops:`",
                )
        return function(*args, **kwargs)

    return adapted


def _unserved(row: Choice) -> Callable[..., Any]:
    """Stands in the slot of an op that the plan leaves out, and says so when it is called all the same."""

    def unserved(*args: Any, **kwargs: Any) -> Any:
        raise PluginError(
            f"{row.op} was called, but the plan leaves it out",
            why=f"{row.covered_by} covers it" if row.covered_by else row.reason,
            fix=f"pin an offer for {row.op} under `ops:`, or change the setting that makes it optional",
        )

    return unserved


class _NoEngine:
    """Stands where a backend has no engine."""

    def __init__(self, setup: object) -> None:
        raise PluginError(
            "a backend of references has no engines",
            why="reference_backend() binds ops only",
            fix="bind a plan to get engines",
        )
