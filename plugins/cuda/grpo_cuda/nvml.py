"""What NVIDIA's management library says of the GPUs: it comes with the driver and starts no CUDA context."""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass
from typing import Any

LIBRARIES = ("libnvidia-ml.so.1", "libnvidia-ml.so", "nvml.dll")
TEXT = 96
"""Bytes of the longest name or identifier that the library writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of the host, whether or not this process may use it."""

    name: str
    uuid: str
    memory_bytes: int
    capability: int
    """Major times ten plus minor: 90 for 9.0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The driver and its GPUs, in the order of the PCI bus."""

    version: str
    cuda: int
    """Newest CUDA that it serves, major times ten plus minor: 128 for 12.8; 0 where it does not say."""
    gpus: tuple[Gpu, ...]


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def read_driver(libraries: tuple[str, ...] = LIBRARIES) -> Driver | str:
    """The driver, or why there is none."""
    library = _open(libraries)
    if isinstance(library, str):
        return library
    failed = library.nvmlInit_v2()
    if failed:
        return f"the driver does not answer ({_error(library, failed)})"
    try:
        return _read(library)
    finally:
        library.nvmlShutdown()


def _open(libraries: tuple[str, ...]) -> Any:
    for name in libraries:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return f"no NVIDIA driver: {libraries[0]} is not here"


def _read(library: Any) -> Driver | str:
    count = ctypes.c_uint()
    failed = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    if failed:
        return f"the driver does not count its GPUs ({_error(library, failed)})"
    cuda = ctypes.c_int()
    told = library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)) == 0
    return Driver(
        version=_text(library.nvmlSystemGetDriverVersion),
        # 12080 is 12.8
        cuda=cuda.value // 1000 * 10 + cuda.value % 1000 // 10 if told else 0,
        gpus=tuple(_gpu(library, index) for index in range(count.value)),
    )


def _gpu(library: Any, index: int) -> Gpu:
    """What is known of a GPU: a value that the library does not tell is empty or 0."""
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)):
        return Gpu(name="", uuid="", memory_bytes=0, capability=0)
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(
        name=_text(library.nvmlDeviceGetName, handle),
        uuid=_text(library.nvmlDeviceGetUUID, handle),
        memory_bytes=memory.total,
        capability=major.value * 10 + minor.value,
    )


def _text(call: Any, *handle: Any) -> str:
    buffer = ctypes.create_string_buffer(TEXT)
    return "" if call(*handle, buffer, ctypes.c_uint(TEXT)) else buffer.value.decode(errors="replace")


def _error(library: Any, code: int) -> str:
    library.nvmlErrorString.restype = ctypes.c_char_p
    text = library.nvmlErrorString(ctypes.c_int(code))
    return text.decode(errors="replace") if text else f"NVML error {code}"
