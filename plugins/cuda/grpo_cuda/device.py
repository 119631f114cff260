"""An NVIDIA GPU as a device: probed through the driver's library, torch imported where it is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from grpo_core.devices.base import Probe
from grpo_core.devices.graphs import FEATURE, TorchGraph, record
from grpo_core.errors import PluginError
from grpo_core.impl import DeviceInfo

from . import host
from .nvml import Gpu, read_driver

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from grpo_core.devices.base import Graph

T = TypeVar("T")

DTYPES = frozenset({"bfloat16", "float16", "float32", "float64"})
BFLOAT16_FROM = 80
"""Compute capability from which bfloat16 products are native."""
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Values of it with which cuBLAS gives equal bits on one stream; the first is set where none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """Implements `Device` over torch.cuda.

    `deterministic` asks torch and cuBLAS for equal bits from equal inputs; it is set before the first
    product, because cuBLAS reads its setting when a handle is made.
    """

    name: str = "cuda"
    type: str = "cuda"
    vendor: str = "NVIDIA"
    visible_env: str = "CUDA_VISIBLE_DEVICES"
    comm: str = "nccl"
    deterministic: bool = True
    doctor: str = "grpo_cuda.doctor"
    """Module behind `grpo doctor --device cuda`."""

    def probe(self) -> Probe:
        """Found where a driver, a GPU and a torch built for CUDA are; else the reasons, each with its fix.

        Features: "graphs", "fast_bf16", and "sm_90" or another compute capability, the lowest of the visible
        GPUs.
        """
        driver = read_driver()
        missing = list(host.lacks(driver, host.torch_built_for()))
        present = () if isinstance(driver, str) else driver.gpus
        shown = host.visible(os.environ, self.visible_env, present)
        if missing:
            reason = "; ".join(map(str, missing))
        elif len(shown) < len(present):
            reason = (
                f"{len(shown)} of {len(present)} visible by {self.visible_env}={os.environ[self.visible_env]}"
            )
        else:
            reason = f"{len(present)} found"
        if not isinstance(driver, str) and not missing:
            reason += f", driver {driver.version}"
        info = self._info(shown, count=0 if missing else len(shown))
        return Probe(found=info.count > 0, reason=reason, info=info)

    def _info(self, gpus: tuple[Gpu, ...], *, count: int) -> DeviceInfo:
        lowest = min((gpu.capability for gpu in gpus if gpu.capability), default=0)
        # Without a GPU to ask, a plan on paper is for one of those that people train on.
        features = {FEATURE} | ({"fast_bf16"} if lowest == 0 or lowest >= BFLOAT16_FROM else set())
        return DeviceInfo(
            type=self.type,
            vendor=self.vendor,
            name=gpus[0].name if gpus else "NVIDIA GPU",
            count=count,
            memory_bytes=min((gpu.memory_bytes for gpu in gpus), default=0),
            dtypes=DTYPES,
            features=frozenset(features | ({f"sm_{lowest}"} if lowest else set())),
        )

    def open(self, index: int) -> torch.device:
        """Set torch up before the first product, select GPU `index` and return it.

        Raises `PluginError` when torch sees no such GPU, and for a cuBLAS workspace in the environment that
        contradicts `deterministic`.
        """
        import torch

        if self.deterministic:
            self._equal_bits()
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise PluginError(
                f"device {self.name}:{index} cannot be opened",
                why=f"torch {torch.__version__} sees {count} GPU(s); probe: {self.probe().reason}",
                fix="nvidia-smi must list the GPU; `grpo doctor` shows what is missing",
            )
        # Sums of bfloat16 products that are split up are otherwise added in bfloat16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        device = torch.device(self.type, index)
        torch.cuda.set_device(device)
        return device

    def _equal_bits(self) -> None:
        import torch

        asked = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
        if asked not in WORKSPACES:
            raise PluginError(
                f"{WORKSPACE}={asked} gives other bits from run to run",
                why="cuBLAS repeats its results only with a workspace for each stream",
                fix=f"unset {WORKSPACE}, or set it to one of {', '.join(WORKSPACES)}",
            )
        # Ops without such an implementation warn: an error would name torch's rules, not the run's.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False

    def settings(self) -> Mapping[str, str]:
        """What `open` sets in this process, by name, for people."""
        always = {
            "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": "False",
            "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": "False",
        }
        if not self.deterministic:
            return always
        return {
            WORKSPACE: os.environ.get(WORKSPACE, WORKSPACES[0]),
            "torch.use_deterministic_algorithms": "True, warn_only=True",
            **always,
        }

    def synchronize(self) -> None:
        """Wait for all work queued on the selected GPU."""
        import torch

        torch.cuda.synchronize()

    def seed(self, seed: int) -> None:
        """Seed the host's generator and those of all GPUs; keeps the low 64 bits."""
        import torch

        torch.manual_seed(seed & (2**64 - 1))

    def rng_state(self) -> Tensor:
        """uint8 [16]: seed and offset of the selected GPU's generator."""
        import torch

        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        """Continue from `rng_state`."""
        import torch

        torch.cuda.set_rng_state(state)

    def capture(self, call: Callable[[], T], *, beside: Graph | None) -> tuple[T, Graph]:
        """See `GraphDevice.capture`."""
        import torch

        return record(torch.cuda, call, beside=beside if isinstance(beside, TorchGraph) else None)


CUDA = Cuda()
