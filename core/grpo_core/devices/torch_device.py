"""A device over `torch.get_device_module(type)`: a new chip with a torch backend needs these few facts."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import PluginError
from ..impl import DeviceInfo
from .base import Probe
from .graphs import TorchGraph, record

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from .base import Graph

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDevice:
    """Implements `Device` for a torch device type.

    Found means: every package of `packages` is installed, and device files match `files` and are not all
    hidden by `visible_env`. Nothing is imported for that; the runtime is first touched by `open`.
    """

    name: str
    type: str
    vendor: str
    visible_env: str
    comm: str
    product: str = ""
    """Name for people; the runtime's own name is not known before it is started."""
    packages: tuple[str, ...] = ()
    """Top-level modules that must be importable, the first of them imported by `open`."""
    files: str = ""
    """Glob pattern of the device files, one a device: "/dev/acme[0-9]*". Empty: there are `count` devices."""
    count: int = 1
    """Devices where no file tells how many there are."""
    dtypes: frozenset[str] = frozenset({"bfloat16", "float16", "float32"})
    features: frozenset[str] = frozenset({"fast_bf16"})
    memory_bytes: int = 0
    doctor: str = ""
    """Module with checks of the host and tested versions, for `grpo doctor` (`devices.doctor.Doctor`)."""

    def probe(self) -> Probe:
        """Look for packages, device files and the visibility variable."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return self._probe(0, f"package {package} is not installed")
        present = len(glob.glob(self.files)) if self.files else self.count
        if not present:
            return self._probe(0, f"no device file matches {self.files}")
        visible = os.environ.get(self.visible_env) if self.visible_env else None
        if visible is None:
            return self._probe(present, f"{present} found")
        listed = [item for item in visible.split(",") if item.strip()]
        # By convention of the vendors' runtimes, -1 and whatever follows it hide devices.
        listed = listed[: listed.index("-1")] if "-1" in listed else listed
        shown = min(present, len(listed))
        return self._probe(shown, f"{shown} of {present} visible by {self.visible_env}={visible}")

    def _probe(self, count: int, reason: str) -> Probe:
        info = DeviceInfo(
            type=self.type,
            vendor=self.vendor,
            name=self.product or self.name,
            count=count,
            memory_bytes=self.memory_bytes,
            dtypes=self.dtypes,
            features=self.features,
        )
        return Probe(found=count > 0, reason=reason, info=info)

    def open(self, index: int) -> torch.device:
        """Import the vendor's package, select device `index` and return it. Raises `PluginError`."""
        import torch

        for package in self.packages[:1]:
            importlib.import_module(package)
        module = self._module()
        if not module.is_available() or index >= module.device_count():
            count = module.device_count() if module.is_available() else 0
            raise PluginError(
                f"device {self.name}:{index} cannot be opened",
                why=f"torch {torch.__version__} sees {count} of its type; probe: {self.probe().reason}",
                fix="check the driver and that this torch was built for it; `grpo doctor` shows both",
            )
        device = torch.device(self.type, index)
        module.set_device(device)
        return device

    def synchronize(self) -> None:
        """Wait for all work queued on the selected device."""
        self._module().synchronize()

    def seed(self, seed: int) -> None:
        """Seed the host's generator and those of all devices; keeps the low 64 bits."""
        import torch

        torch.manual_seed(seed & (2**64 - 1))

    def rng_state(self) -> Tensor:
        """uint8 state of the selected device's generator."""
        state: Tensor = self._module().get_rng_state()
        return state

    def set_rng_state(self, state: Tensor) -> None:
        """Continue from `rng_state`."""
        self._module().set_rng_state(state)

    def capture(self, call: Callable[[], T], *, beside: Graph | None) -> tuple[T, Graph]:
        """See `GraphDevice.capture`; for devices with the feature "graphs", whose torch module has them."""
        return record(self._module(), call, beside=beside if isinstance(beside, TorchGraph) else None)

    def _module(self) -> Any:
        import torch

        try:
            return torch.get_device_module(self.type)
        except RuntimeError as error:
            raise PluginError(
                f"torch has no device type {self.type!r}",
                why=f"{error}".splitlines()[0],
                fix=f"install a torch built for {self.name}"
                + f" and {self.packages[0]}" * bool(self.packages),
            ) from error
