"""What a device is to the core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..impl import DeviceInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a device is here, found out without importing its vendor's package."""

    found: bool
    reason: str
    """Why it was or was not found, as a person would say it."""
    info: DeviceInfo


class Device(Protocol):
    """A chip. `TorchDevice` implements it over `torch.get_device_module(type)`."""

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
