"""What a device is to the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..impl import DeviceInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..ops.common import Common

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a device is here, found out without importing its vendor's package."""

    found: bool
    reason: str
    """Why it was or was not found, as a person would say it."""
    info: DeviceInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """Something that keeps a host from using its chips."""

    part: str
    """Which part of the host: "driver", "torch"."""
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} (fix: {self.fix})"


class Device(Protocol):
    """A chip. `TorchDevice` implements it over `torch.get_device_module(type)`.

    It may also have `doctor`, the dotted name of a module that tells what a host lacks and which versions
    were tested: see `grpo_core.devices.doctor.Doctor`.
    """

    @property
    def name(self) -> str:
        """Key of `device:` in the config: "cpu", "cuda", "ascend"."""
        ...

    @property
    def type(self) -> str:
        """Torch device type."""
        ...

    @property
    def vendor(self) -> str: ...

    @property
    def visible_env(self) -> str:
        """Environment variable that limits the visible devices; "" for none."""
        ...

    @property
    def comm(self) -> str:
        """Name of its collective backend."""
        ...

    def probe(self) -> Probe: ...

    def open(self, index: int) -> torch.device:
        """The torch device, vendor package imported and set up. Raises `GrpoError` when it is absent."""
        ...

    def synchronize(self) -> None: ...

    def seed(self, seed: int) -> None: ...

    def rng_state(self) -> Tensor: ...

    def set_rng_state(self, state: Tensor) -> None: ...


class Graph(Protocol):
    """Work of a device that was recorded once and is started again by one call."""

    def replay(self, common: Common | None) -> None:
        """Do the work again, on the tensors that it was recorded with; queued, not waited for.

        `common` holds the lengths of this time, for kernels that take them from the host.
        """
        ...

    def nbytes(self) -> int:
        """Bytes of device memory taken for it, besides the tensors that its call was given."""
        ...

    def release(self) -> None:
        """Give its memory back; it cannot be replayed afterwards, and what its call returned is lost."""
        ...


class GraphDevice(Protocol):
    """What a `Device` has more whose `DeviceInfo.features` hold "graphs"."""

    def capture(self, call: Callable[[], T], *, beside: Graph | None) -> tuple[T, Graph]:
        """Record what `call` does; what it returned, and the graph whose replays write into that.

        `call` is run a few times before, so that it must do no harm when it is repeated, and reads and writes
        tensors that stay where they are. `beside` is an earlier graph of this device whose memory may be
        shared: what one of the two returned is lost when the other is replayed. Raises RuntimeError for work
        that cannot be recorded.
        """
        ...
