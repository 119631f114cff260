"""The vendor's package of the simulated device: importing it registers the torch device type "sim".

It does what `import torch_npu` does for another chip: load the backend, name the PrivateUse1 device and give
torch the Python module `torch.sim`. `ops` are the switches that only a simulation has (capacity, faults).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from grpo_core.errors import PluginError

from .build import CACHE, build
from .graph import SimGraph, graph, is_current_stream_capturing

NAME = "sim"
MASK = 2**63 - 1


def _load() -> Any:
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        raise PluginError(
            "the simulated device cannot be opened",
            why=f"this process has the device type {taken!r} in torch's only place for a foreign one",
            fix=f"run it in a process that does not import the package of {taken!r}",
        )
    library = build(Path.home() / CACHE)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise PluginError(
            "the simulated device cannot be loaded",
            why=str(error).splitlines()[0],
            fix=f"delete {library.parent}, so that it is built again",
        ) from error
    return torch.ops.grpo_sim


def index_of(device: Any = None) -> int:
    """Index of a device given as nothing, a number, a name or a `torch.device`."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return int(ops.current_device()) if index is None else index


@contextlib.contextmanager
def selected(device: Any) -> Iterator[None]:
    """`torch.sim.device`: select a device for a while."""
    before = ops.current_device()
    ops.set_device(index_of(device))
    try:
        yield
    finally:
        ops.set_device(before)


@contextlib.contextmanager
def on_stream(stream: torch.Stream | None) -> Iterator[None]:
    """`torch.sim.stream`: queue work on a stream for a while."""
    if stream is None:
        yield
        return
    with stream:
        yield


def synchronize(device: Any = None) -> None:
    """`torch.sim.synchronize`. Raises RuntimeError in a capture, as a chip's runtime does."""
    if is_current_stream_capturing():
        raise RuntimeError("the host waits for the device in a capture")
    ops.synchronize(index_of(device))


def _module() -> ModuleType:
    made = ModuleType(f"torch.{NAME}")
    module: Any = made
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = ops.device_count
    module.current_device = ops.current_device
    module.set_device = lambda device: ops.set_device(index_of(device))
    module.device = selected
    module.synchronize = synchronize
    module.SimGraph, module.graph = SimGraph, graph
    module.is_current_stream_capturing = is_current_stream_capturing
    _add_streams(module)
    _add_random(module)
    _add_memory(module)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.is_bf16_supported = lambda: True
    return made


def _add_streams(module: Any) -> None:
    module.Stream, module.Event, module.stream = torch.Stream, torch.Event, on_stream
    module.current_stream = lambda device=None: torch.accelerator.current_stream(index_of(device))
    module.set_stream = torch.accelerator.set_stream


def _add_random(module: Any) -> None:
    def seed_all(seed: int) -> None:
        for index in range(ops.device_count()):
            ops.seed(index, seed & MASK)

    def get_state(device: Any = None) -> Tensor:
        state: Tensor = ops.rng_state(index_of(device))
        return state

    def set_state(state: Tensor, device: Any = None) -> None:
        ops.set_rng_state(index_of(device), state)

    module.manual_seed_all = seed_all
    # torch.manual_seed calls it once, and means all devices.
    module.manual_seed = seed_all
    module.get_rng_state, module.set_rng_state = get_state, set_state


def _add_memory(module: Any) -> None:
    def account(place: int) -> Any:
        return lambda device=None: ops.account(index_of(device))[place]

    def information(device: Any = None) -> tuple[int, int]:
        figures = ops.account(index_of(device))
        return figures[7] - figures[0], figures[7]

    module.memory_allocated = module.memory_reserved = account(0)
    module.max_memory_allocated = module.max_memory_reserved = account(1)
    module.mem_get_info = information
    module.reset_peak_memory_stats = lambda device=None: ops.reset_peak(index_of(device))
    module.empty_cache = lambda: None


ops = _load()
backend_registration.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _module())  # type: ignore[no-untyped-call]
backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
