"""How the time of our step grows with group size, completion length and model size.

    python benchmarks/scaling.py --steps 3

One size is varied at a time around the "tiny" workload. The exponent is the slope of log time over log size:
1 is proportional, 0 is free. What is shared by a group (its prompt) or by a token step (reading the weights)
shows as an exponent below 1.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Job, emit
from compare import run_one
from workloads import WORKLOADS, job_of, prepare

HERE = Path(__file__).parent
HIDDEN = 128


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Least-squares slope of log(time) over log(size)."""
    xs, ys = [math.log(size) for size in sizes], [math.log(seconds) for seconds in times]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def run_job(name: str, job: Job) -> dict[str, Any]:
    """One process with our step."""
    return run_one(name, [sys.executable, str(HERE / "bench_step.py"), *job.flags()], {})


def sweeps(base: Job, folder: Path, count: int) -> dict[str, list[tuple[int, Job]]]:
    """Sizes with their jobs, by what is varied."""
    layers = [2 * 2**i for i in range(count)]
    models = [prepare("tiny", folder, layers=n, hidden=HIDDEN)[0] for n in layers]
    return {
        "group size": [(base.group * 2**i, replace(base, group=base.group * 2**i)) for i in range(count)],
        "completion length": [
            (base.completion * 2**i, replace(base, completion=base.completion * 2**i)) for i in range(count)
        ],
        "layers": [(n, replace(base, model=model)) for n, model in zip(layers, models, strict=True)],
    }


def main() -> int:
    """Run the sweeps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--points", type=int, default=3, help="sizes of each sweep, each twice the one before"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="the smallest")
    parser.add_argument("--completion", type=int, default=16, help="the shortest")
    args = parser.parse_args()
    if args.points < 2:
        parser.error("--points must be 2 or more: one size has no slope")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        model, data = prepare("tiny", Path(folder), hidden=HIDDEN)
        base = job_of(WORKLOADS["tiny"], model, data, steps=args.steps, warmup=1)
        base = replace(base, prompts=args.prompts, group=args.group, completion=args.completion)
        print("| varied | sizes | step (s) | rollout (s) | train (s) | exponents: step, rollout, train |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, points in sweeps(base, Path(folder), args.points).items():
            sizes = [size for size, _ in points]
            rows = [run_job(name, job) for _, job in points]
            series = {
                "step": [row["step_s"] for row in rows],
                "rollout": [row["phases_s"]["rollout"] for row in rows],
                "train": [row["phases_s"]["train"] for row in rows],
            }
            slopes = {key: exponent(sizes, values) for key, values in series.items()}
            results[name] = {"sizes": sizes, **series, "exponents": slopes}
            cells = [", ".join(f"{value:.3f}" for value in values) for values in series.values()]
            slope = ", ".join(f"{value:.2f}" for value in slopes.values())
            print(f"| {name} | {', '.join(map(str, sizes))} | {' | '.join(cells)} | {slope} |", flush=True)
    emit(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
