"""Our GRPO step against TRL's: same weights, prompts, group size, lengths and arithmetic, in turns.

    python benchmarks/compare.py --trl-python VENV/bin/python --workload smollm2 --rounds 3

Each round runs every contender in a process of its own, in an order that turns round by round, so that a
machine that gets slower hits all alike. Ratios are of medians over all measured steps of all rounds. The
whole of it is written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Job, last_json, machine
from limits import floors, measure
from workloads import WORKLOADS, job_of, prepare

HERE = Path(__file__).parent
PEERS = {
    "smollm2": ("--attn eager --micro 16", "--attn sdpa --micro 64"),
    "tiny": ("--attn sdpa", "--attn eager"),
}
"""TRL settings worth trying for each workload; the fastest is the one that counts."""

Records = dict[str, list[dict[str, Any]]]


def contenders(args: argparse.Namespace, job: Job) -> dict[str, list[str]]:
    """Name -> command line."""
    ours = [sys.executable, str(HERE / "bench_step.py"), *job.flags(), *args.override]
    commands = {"grpo-core": ours}
    for flags in args.peer or PEERS[args.workload] if args.trl_python else ():
        preload = ["--tcmalloc", args.tcmalloc] if args.tcmalloc else []
        commands[f"trl {flags}"] = [
            args.trl_python, str(HERE / "bench_trl.py"), *job.flags(), *shlex.split(flags), *preload,
        ]  # fmt: skip
    return commands


def run_rounds(commands: Mapping[str, Sequence[str]], rounds: int, environment: Mapping[str, str]) -> Records:
    """The records of every contender, one a round."""
    records: Records = {name: [] for name in commands}
    names = list(commands)
    for number in range(rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            records[name].append(run_one(name, commands[name], environment))
            row = records[name][-1]
            print(
                f"round {number + 1}  {name:32} {row['step_s']:9.3f} s"
                f"  {row['peak_rss_bytes'] / 2**30:6.2f} GiB",
                file=sys.stderr,
                flush=True,
            )
    return records


def run_one(name: str, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """One process to its end. Raises RuntimeError with its last words when it fails."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return last_json(done.stdout)


def check_same_work(records: Records) -> None:
    """Raises RuntimeError when the contenders did not get the same prompts or lengths."""
    seen = {name: (runs[0]["prompt_tokens"], runs[0]["completion_tokens"]) for name, runs in records.items()}
    if len(set(seen.values())) > 1:
        raise RuntimeError(f"the contenders did different work (prompt, completion tokens): {seen}")


def summary(records: Records) -> dict[str, Any]:
    """Medians by contender, and the ratios of the best peer to ours (above 1: ours is better)."""
    rows = {
        name: {
            "step_s": statistics.median(seconds for row in runs for seconds in row["steps_s"]),
            "peak_gib": statistics.median(row["peak_rss_bytes"] for row in runs) / 2**30,
            "phases_s": {
                phase: statistics.median(row["phases_s"][phase] for row in runs)
                for phase in runs[0]["phases_s"]
            },
        }
        for name, runs in records.items()
    }
    peers = [name for name in rows if name != "grpo-core"]
    if not peers:
        return {"contenders": rows}
    best = min(peers, key=lambda name: rows[name]["step_s"])
    leanest = min(peers, key=lambda name: rows[name]["peak_gib"])
    ours = rows["grpo-core"]
    return {
        "contenders": rows,
        "best_peer": best,
        "time_ratio": rows[best]["step_s"] / ours["step_s"],
        "memory_ratio": rows[best]["peak_gib"] / ours["peak_gib"],
        "leanest_peer": leanest,
        "memory_ratio_leanest": rows[leanest]["peak_gib"] / ours["peak_gib"],
    }


def show(result: Mapping[str, Any]) -> None:
    """The summary as a Markdown table."""
    phases = ("rollout", "train", "sync", "other")
    print(f"| contender | step (s) | {' | '.join(phases)} | peak (GiB) | rollout, train / bound |")
    print(f"| --- | --- | {' | '.join('---' for _ in phases)} | --- | --- |")
    for name, row in result["contenders"].items():
        cells = " | ".join(f"{row['phases_s'][phase]:.3f}" for phase in phases)
        share = ", ".join(f"{row['share_of_bound'][phase]:.0%}" for phase in ("rollout", "train"))
        print(f"| {name} | {row['step_s']:.3f} | {cells} | {row['peak_gib']:.2f} | {share} |")
    if "time_ratio" in result:
        print(
            f"\n{result['time_ratio']:.2f} times as fast as {result['best_peer']}, which takes"
            f" {result['memory_ratio']:.2f} times the memory"
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="smollm2")
    parser.add_argument(
        "--trl-python", default="", help="interpreter that has TRL; without it only ours is run"
    )
    parser.add_argument(
        "--peer", action="append", help="TRL settings, e.g. '--attn eager --micro 16'; repeatable"
    )
    parser.add_argument("--tcmalloc", default="", help="allocator to preload for TRL")
    parser.add_argument("--override", action="append", default=[], metavar="key=value", help="for grpo-core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--passive", action="store_true", help="waiting threads sleep (for shared cores)")
    for size in ("prompts", "group", "completion"):
        parser.add_argument(f"--{size}", type=int, help="instead of the workload's own")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="instead of the workload's own")
    parser.add_argument("--threads", type=int, help="instead of the workload's own")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def main() -> int:
    """Prepare, run, print, write."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        model, data = prepare(args.workload, Path(folder))
        job = job_of(WORKLOADS[args.workload], model, data, steps=args.steps, warmup=args.warmup)
        given = {name: getattr(args, name) for name in ("prompts", "group", "completion", "dtype", "threads")}
        job = replace(job, **{name: value for name, value in given.items() if value})
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} if args.passive else {}
        records = run_rounds(contenders(args, job), args.rounds, environment)
        check_same_work(records)
        limits = measure(job.threads, 0.5)
        bounds = floors(records["grpo-core"][0], limits)
    result = summary(records)
    for row in result["contenders"].values():
        row["share_of_bound"] = {phase: bounds[phase] / row["phases_s"][phase] for phase in bounds}
    show(result)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.workload}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    content = {
        "workload": args.workload,
        "rounds": args.rounds,
        "passive": args.passive,
        "summary": result,
        "limits": limits,
        "bounds_s": bounds,
        "machine": machine(),
        "records": public(records),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{path}", file=sys.stderr)
    return 0


def public(records: Records) -> Records:
    """Records without this machine's paths."""
    return {
        name: [
            {**row, "job": {**row["job"], "model": Path(row["job"]["model"]).name, "data": ""}}
            for row in runs
        ]
        for name, runs in records.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
