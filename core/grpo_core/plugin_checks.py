"""What an answer to a hook must look like; each check gives the problem in words, or None."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from .impl import PROOFS, Impl
from .ops.contract import Contract
from .requirements import requirement_problem

CACHES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention.cache": ("attention.prefill", "attention.decode", "attention.step"),
        "mla.cache": ("mla.prefill", "mla.decode"),
    }
)
"""Op of a cache -> ops that read it; the layout belongs to the offer of the cache."""
CACHE_OF: Mapping[str, str] = MappingProxyType(
    {reader: cache for cache, readers in CACHES.items() for reader in readers}
)
"""The same the other way: reader -> op of its cache."""

_POINTER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DEVICE_MEMBERS = ("name", "type", "vendor", "visible_env", "comm", "probe", "open", "synchronize", "seed",
                   "rng_state", "set_rng_state")  # fmt: skip
_MODEL_MEMBERS = ("name", "architectures", "arch", "weights", "chat", "recipe")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for a near name, else the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def impl_problem(answer: object, hook: str, contracts: Mapping[str, Contract]) -> str | None:
    """Why `answer`, given to the hook `grpo_<hook>`, is not an offer that the plan can weigh."""
    if not isinstance(answer, Impl):
        return f"answered with {answer!r}, which is not an Impl"
    if not isinstance(answer.op, str) or answer.op not in contracts:
        return f"offers the unknown op {answer.op!r}{did_you_mean(str(answer.op), contracts)}"
    expected = contracts[answer.op].hook
    if expected != hook:
        return f"offers {answer.op} under grpo_{hook}; it belongs under grpo_{expected}"
    problem = _scalar_problem(answer) or _tuple_problem(answer) or _limits_problem(answer)
    return f"offer {answer.op} {answer.name!r}: {problem}" if problem else None


def _scalar_problem(impl: Impl) -> str | None:
    if not isinstance(impl.name, str) or not re.fullmatch(r"[^\s:]+", impl.name):
        return "its name must be a word without ':'"
    if not isinstance(impl.device, str) or not impl.device:
        return f"device must be a torch device type or '*', not {impl.device!r}"
    if not isinstance(impl.load, str) or not _POINTER.fullmatch(impl.load):
        return f"load must be 'package.module:attribute', not {impl.load!r}"
    for field in ("backward", "graph", "deterministic", "batch_invariant"):
        if not isinstance(getattr(impl, field), bool):
            return f"{field} must be True or False, not {getattr(impl, field)!r}"
    for field in ("rank", "contract"):
        if not isinstance(getattr(impl, field), int) or getattr(impl, field) < 0:
            return f"{field} must be an int of 0 or more, not {getattr(impl, field)!r}"
    if impl.proof not in PROOFS:
        return f"proof must be one of {', '.join(map(repr, PROOFS))}, not {impl.proof!r}"
    if impl.when is not None and not callable(impl.when):
        return f"when must be callable or None, not {impl.when!r}"
    return None


def _tuple_problem(impl: Impl) -> str | None:
    for field in ("requires", "symbols"):
        value = getattr(impl, field)
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            return f"{field} must be a tuple of strings, not {value!r} (one item needs a comma)"
    for requirement in impl.requires:
        problem = requirement_problem(requirement)
        if problem:
            return f"requires holds {requirement!r}, which is not a PEP 508 requirement: {problem}"
    return None


def _limits_problem(impl: Impl) -> str | None:
    if not isinstance(impl.limits, Mapping):
        return f"limits must be a mapping of fact to allowed values, not {impl.limits!r}"
    for fact, allowed in impl.limits.items():
        if not isinstance(fact, str):
            return f"limits names the fact {fact!r}; facts are strings"
        # A string is a container of its substrings: "float" would be found in "bfloat16".
        if isinstance(allowed, str | bytes) or not hasattr(allowed, "__contains__"):
            return f"limits[{fact!r}] must be a set, range or other container of values, not {allowed!r}"
    if impl.op in CACHE_OF and "cache" not in impl.limits:
        return "it reads a cache, so limits['cache'] must name the ids of the caches it can read"
    return None


def device_problem(answer: object) -> str | None:
    """Why `answer` is not a `Device`."""
    missing = [member for member in _DEVICE_MEMBERS if not hasattr(answer, member)]
    return f"answered with {answer!r}, a device without {', '.join(missing)}" if missing else None


def model_problem(answer: object) -> str | None:
    """Why `answer` is not a `ModelPlugin`."""
    missing = [member for member in _MODEL_MEMBERS if not hasattr(answer, member)]
    if missing:
        return f"answered with {answer!r}, a model family without {', '.join(missing)}"
    claimed = answer.architectures  # type: ignore[attr-defined]
    if not isinstance(claimed, tuple) or not claimed or not all(isinstance(name, str) for name in claimed):
        return f"architectures must be a tuple of names from config.json, not {claimed!r}"
    return None
