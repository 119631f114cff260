"""Whether autograd can go through a vendor's function, read off its source.

A function is differentiable if what it calls ends in `apply` of an autograd.Function whose backward pass does
more than raise, or in nothing but torch; it is not if it comes to a kernel by another way: a launch
`kernel[grid](...)`, a module in C++, or a custom op without a registered formula.
"""

from __future__ import annotations

import ast
import enum
from collections.abc import Iterable, Iterator

from .definitions import Definition, Definitions
from .names import dotted

KERNELS = ("flash_attn_2_cuda", "flash_attn_gpu", "transformer_engine_torch", "causal_conv1d_cuda", "tex")
"""Modules in C++ whose functions autograd does not see."""
DEPTH = 8
"""Calls followed inwards."""


class Way(enum.Enum):
    """How a call comes to its kernels."""

    FORMULA = "through a backward pass"
    REFUSED = "through a backward pass that raises"
    KERNEL = "straight"


def differentiable(found: Definition, definitions: Definitions) -> bool:
    """Whether gradients come through; a class counts as its `forward`."""
    if isinstance(found.node, ast.ClassDef):
        forward = definitions.method(found.module, found.node, "forward")
        return not forward or differentiable(forward[0], definitions)
    others = False
    for way in _ways(found, definitions, set(), 0):
        if way is Way.FORMULA:
            return True
        others = True
    return not others


def _ways(found: Definition, all_of: Definitions, seen: set[int], depth: int) -> Iterator[Way]:
    if found.apply and found.owner is not None:
        yield _formula(found, all_of)
        return
    if found.node is None or id(found.node) in seen or depth > DEPTH:
        return
    seen.add(id(found.node))
    if isinstance(found.node, ast.ClassDef):
        return
    if any(_named(one, ("custom_op", "_torch_custom_op_wrapper")) for one in found.node.decorator_list):
        yield Way.FORMULA if _registered(found, all_of) else Way.KERNEL
        return
    local = _assigned(found.node)
    for call in _calls(found.node.body):
        if isinstance(call.func, ast.Subscript):
            yield Way.KERNEL
            continue
        chain = dotted(call.func)
        chains = local.get(chain[0], [chain]) if len(chain) == 1 else [chain]
        for chain in filter(None, chains):
            there = list(_called(chain, found, all_of))
            if any(one.outside.split(".")[0] in KERNELS for one in there):
                yield Way.KERNEL
                continue
            for one in there:
                yield from _ways(one, all_of, seen, depth + 1)


def _assigned(node: ast.AST) -> dict[str, list[list[str]]]:
    """Local name -> the chains of names that it is given."""
    found: dict[str, list[list[str]]] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign) and (chain := dotted(inner.value)):
            for target in inner.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(chain)
    return found


def _called(chain: list[str], within: Definition, all_of: Definitions) -> Iterable[Definition]:
    if chain[0] in ("self", "cls") and within.owner is not None:
        return all_of.method(within.module, within.owner, chain[1]) if len(chain) == 2 else ()
    imported = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(within.node) if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names if (alias.asname or alias.name) == chain[0]
    ] if within.node is not None else []  # fmt: skip
    if imported:
        return all_of.find(".".join([imported[0], *chain[1:]]))
    there = all_of.inside(within.module, chain)
    if not there and any(all_of.is_compiled(path) for path in all_of.imports(within.module, chain[0])):
        return [Definition(module="", outside=KERNELS[0])]
    return there


def _calls(body: Iterable[ast.stmt]) -> Iterator[ast.Call]:
    """Calls that autograd sees: what stands under `torch.no_grad()` is left out."""
    left: list[ast.AST] = list(body)
    while left:
        node = left.pop()
        if isinstance(node, ast.With) and any(
            _named(item.context_expr, ("no_grad", "inference_mode")) for item in node.items
        ):
            continue
        if isinstance(node, ast.Call):
            yield node
        left += ast.iter_child_nodes(node)


def _formula(found: Definition, all_of: Definitions) -> Way:
    """Whether the backward pass beside a `forward` does anything but raise."""
    assert found.owner is not None
    halves = all_of.method(found.module, found.owner, "backward")
    if not halves or halves[0].node is None or isinstance(halves[0].node, ast.ClassDef):
        return Way.REFUSED
    body = [node for node in halves[0].node.body
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]  # fmt: skip
    return Way.REFUSED if body and isinstance(body[0], ast.Raise) else Way.FORMULA


def _registered(found: Definition, all_of: Definitions) -> bool:
    """Whether a custom op's module gives it a formula."""
    assert found.node is not None
    return any(
        isinstance(node, ast.Call) and _named(node.func, ("register_autograd",))
        and (found.node.name in dotted(node.func)
             or any(found.node.name in ast.unparse(argument) for argument in node.args))
        for node in ast.walk(all_of.sources.tree(found.module))
    )  # fmt: skip


def _named(node: ast.expr, names: tuple[str, ...]) -> bool:
    chain = dotted(node.func if isinstance(node, ast.Call) else node)
    return bool(chain) and chain[-1] in names
