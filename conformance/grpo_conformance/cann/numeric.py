"""Gives the operations of a loaded torch_npu their numbers: aten's in C++, torch_npu's own by references.

Called once, right after the import of torch_npu, in every process with the simulated CANN.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

KEPT = (
    "_copy_from", "_copy_from_and_resize", "_local_scalar_dense", "_pin_memory", "_resize_output_",
    "_to_copy", "copy_", "empty", "empty_like", "empty_strided", "is_pinned", "new_empty_strided",
    "record_stream", "resize_", "resize_as_", "set_",
)  # fmt: skip
"""Operations of aten that only move memory: torch_npu's own code runs."""

_held: list[Any] = []
"""Registrations end with their object."""


def install() -> None:
    """Replace the kernels. Raises `OSError` when the library of the simulation cannot be loaded."""
    if _held:
        return
    torch.ops.load_library(os.environ["GRPO_CANN_NUMERIC"])  # type: ignore[no-untyped-call]
    torch.ops.grpo_cann.install(list(KEPT))
    from .ops import products, references

    # Older releases lack some operations.
    there = set(torch._C._dispatch_get_all_op_names())
    for space, table in (("npu", references()), ("aten", products.TABLE)):
        library = torch.library.Library(space, "IMPL")  # type: ignore[no-untyped-call]
        _held.append(library)
        for name, reference in table.items():
            if f"{space}::{name}" in there:
                library.impl(name, on_host(reference), "PrivateUse1")  # type: ignore[no-untyped-call]


def host(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of an NPU tensor."""
    alias: Tensor = torch.ops.grpo_cann.host_alias(tensor)
    return alias


def on_host(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for NPU tensors out of a function of CPU tensors.

    Tensors that the function gives back unchanged are given back as the NPU's own, others are copied.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device: list[torch.device] = []
        back: dict[int, Tensor] = {}

        def lower(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.device.type != "npu":
                return x
            device.append(x.device)
            alias = host(x)
            back[id(alias)] = x
            return alias

        def lift(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return back[id(x)] if id(x) in back else x.to(device[0])

        lowered = pytree.tree_map(lower, (args, kwargs))
        return pytree.tree_map(lift, reference(*lowered[0], **lowered[1]))

    return kernel
