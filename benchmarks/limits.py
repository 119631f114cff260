"""What this machine can do: memory bandwidth and matrix products, measured on the spot.

    python benchmarks/limits.py        prints one JSON line

compare.py measures them in the same minute as the engines and writes how near each phase comes to its bound:
on a shared machine a share says more than seconds do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import emit, machine

COPY_BYTES = 256 * 2**20
MATMUL = (2048, 2048, 2048)


def best_time(call: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as fit into `seconds`, two at least; the first is not counted."""
    call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(seconds: float) -> float:
    """Bytes per second of a copy that no cache holds, reads and writes counted."""
    import torch

    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_time(lambda: target.copy_(source), seconds)


def matmul_rate(dtype: str, seconds: float) -> float:
    """Floating-point operations per second of a square product, a multiplication and an addition as two."""
    import torch

    m, k, n = MATMUL
    a, b = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=a.dtype)
    return 2 * m * k * n / best_time(lambda: torch.mm(a, b, out=out), seconds)


def measure(threads: int, seconds: float) -> dict[str, Any]:
    """All limits with `threads` threads (0: torch's choice)."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    return {
        "copy_bytes_per_s": copy_bandwidth(seconds),
        "bfloat16_flops_per_s": matmul_rate("bfloat16", seconds),
        "float32_flops_per_s": matmul_rate("float32", seconds),
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }


def matrix_parameters(config: Mapping[str, Any]) -> tuple[int, int]:
    """Parameters in the layers' matrices, and in the output head."""
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return config["num_hidden_layers"] * (attention + 3 * hidden * ffn), config["vocab_size"] * hidden


def floors(result: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, float]:
    """Seconds below which the phases of a result cannot fall, from its own sizes.

    Training: 6 operations for each weight and token (forward 2, backward 4), the head on the completions'
    tokens only, a group's prompt once. Decoding: the larger of reading every weight once a token step and
    2 operations for each weight and token. Attention's own work and everything else count as nothing, so
    these are bounds, not estimates.
    """
    job = result["job"]
    layers, head = matrix_parameters(json.loads((Path(job["model"]) / "config.json").read_text()))
    flops = limits[f"{job['dtype']}_flops_per_s"]
    itemsize = 2 if job["dtype"] == "bfloat16" else 4
    completions = result["completion_tokens"]
    prompts = result.get("prompt_tokens", 0.0)
    # A copy counts each byte twice; reading weights counts once and is not slower.
    reading = job["completion"] * (layers + head) * itemsize / limits["copy_bytes_per_s"]
    computing = 2 * ((layers + head) * completions + layers * prompts) / flops
    return {
        "train": 6 * (layers * (completions + prompts) + head * completions) / flops,
        "rollout": max(reading, computing),
    }


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    args = parser.parse_args()
    emit(measure(args.threads, args.seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
