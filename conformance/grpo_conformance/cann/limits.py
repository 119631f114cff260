"""What the simulated CANN cannot tell. Every report of a run on it carries these."""

from __future__ import annotations

LIMITS = (
    "Kernels are references on the CPU: nothing is said of an NPU's numbers, speed or memory traffic.",
    "A kernel refuses what torch_npu's documentation excludes, as far as our references have it.",
    "Work is finished when it is queued: wrong streams and missing events are not seen.",
    "Memory is counted for each process, not for an NPU that processes share.",
    "HCCL sums in float64, and its errors come from the call and not later from a watchdog.",
    "Graph capture, memory shared between processes, swapped memory and internal formats are refused.",
    "An operation of torch_npu without a reference is an error; none does nothing in silence.",
)
