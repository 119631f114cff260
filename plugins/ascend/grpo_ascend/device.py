"""The Ascend NPU as a device: probed from files and metadata, torch_npu imported where it is opened."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from grpo_core.devices.base import Probe
from grpo_core.errors import PluginError
from grpo_core.impl import DeviceInfo

from . import host

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from grpo_core.devices.base import Graph

T = TypeVar("T")

DTYPES = frozenset({"bfloat16", "float16", "float32"})
"""No float64: neither the vector units nor HCCL have it."""
FEATURES = frozenset({"fast_bf16", "graphs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ascend:
    """Implements `Device` over torch_npu.

    `deterministic` is set before the first op, because torch_npu heeds only the setting that a thread's
    first op finds; it covers HCCL's reductions too.
    """

    name: str = "ascend"
    type: str = "npu"
    vendor: str = "Huawei"
    visible_env: str = "ASCEND_RT_VISIBLE_DEVICES"
    comm: str = "hccl"
    deterministic: bool = True
    doctor: str = "grpo_ascend.doctor"
    """Module behind `grpo doctor --device ascend`."""

    def probe(self) -> Probe:
        """Found where driver, CANN and torch_npu are; else the reasons, each with its fix."""
        lacks = list(host.lacks())
        present = host.chips()
        count = 0 if lacks else host.visible(os.environ, self.visible_env, present)
        if lacks:
            reason = "; ".join(map(str, lacks))
        elif count < present:
            reason = f"{count} of {present} visible by {self.visible_env}={os.environ[self.visible_env]}"
        else:
            reason = f"{present} found"
        features, name = FEATURES, "Ascend NPU"
        if host.simulated():
            # Recording is the one thing that the simulation does not have.
            features, name = FEATURES - {"graphs"} | {host.SIMULATED}, f"{name}, simulated CANN"
        info = DeviceInfo(
            type=self.type, vendor=self.vendor, name=name, count=count, dtypes=DTYPES, features=features
        )
        return Probe(found=count > 0, reason=reason, info=info)

    def open(self, index: int) -> torch.device:
        """Import torch_npu, set it up before the first op, select NPU `index` and return it.

        Raises `PluginError` when the package cannot be loaded or sees no such NPU.
        """
        self._load()
        import torch
        import torch_npu

        count = torch_npu.npu.device_count() if torch_npu.npu.is_available() else 0
        if index >= count:
            raise PluginError(
                f"device {self.name}:{index} cannot be opened",
                why=f"torch_npu sees {count} NPU(s); probe: {self.probe().reason}",
                fix="npu-smi info must list the chip; `grpo doctor` shows what is missing",
            )
        if self.deterministic:
            # Ops without such an implementation warn: an error would name torch's rules, not the NPU's.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        torch_npu.npu.set_compile_mode(jit_compile=False)
        torch_npu.npu.config.allow_internal_format = False
        # By default torch_npu computes float32 convolutions in HF32, which has fewer bits.
        torch_npu.npu.conv.allow_hf32 = False
        torch_npu.npu.matmul.allow_hf32 = False
        device = torch.device(self.type, index)
        torch_npu.npu.set_device(device)
        return device

    def synchronize(self) -> None:
        """Wait for all work queued on the selected NPU."""
        import torch_npu

        torch_npu.npu.synchronize()

    def seed(self, seed: int) -> None:
        """Seed the host's generator and those of all NPUs; keeps the low 64 bits."""
        import torch

        torch.manual_seed(seed & (2**64 - 1))

    def rng_state(self) -> Tensor:
        """uint8 [16]: seed and offset of the selected NPU's generator."""
        import torch_npu

        state: Tensor = torch_npu.npu.get_rng_state()
        return state

    def set_rng_state(self, state: Tensor) -> None:
        """Continue from `rng_state`."""
        import torch_npu

        torch_npu.npu.set_rng_state(state)

    def capture(self, call: Callable[[], T], *, beside: Graph | None) -> tuple[T, Graph]:
        """See `GraphDevice.capture`."""
        from .graph import capture

        return capture(call, beside)

    def _load(self) -> None:
        """Import torch_npu, with its error in a user's words."""
        try:
            importlib.import_module("torch_npu")
        except (ImportError, RuntimeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise PluginError(
                "torch_npu cannot be loaded",
                why=f"{why}; probe: {self.probe().reason}",
                fix=f"{host.SET_ENV}; `grpo doctor --device {self.name}` shows what is missing",
            ) from error


ASCEND = Ascend()
