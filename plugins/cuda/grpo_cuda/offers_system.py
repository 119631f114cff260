"""Offers of memory and collectives on CUDA, as data; imports no torch."""

from __future__ import annotations

from grpo_core.impl import Impl

from .offer import VENDOR, offer

OFFERS: tuple[Impl, ...] = (
    offer("memory.allocator", "caching", "memory:CudaMemory", rank=VENDOR),
    offer("comm.collectives", "nccl", "collectives:Nccl", rank=VENDOR, limits={"world": range(1, 65537)}),
)
