"""Rollout alone: tokens per second of this project's engine, transformers and vLLM on the same prompts.

    python benchmarks/bench_rollout.py --engine native --model FOLDER
    python benchmarks/bench_rollout.py --compare native hf vllm --vllm-python VENV/bin/python --model FOLDER

Every completion has exactly `--new` tokens (end-of-text ignored), temperature 1, no filter, log-probs of the
sampled tokens returned. One engine prints one JSON line a workload. `--compare` keeps each engine in a
process of its own and lets them take turns, so that a machine that gets slower hits all alike; the ratios
are of medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import emit, machine, peak_rss
from rollout_engines import ENGINES, Generate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder in Hugging Face layout")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--engine", choices=ENGINES)
    which.add_argument("--compare", nargs="+", choices=ENGINES)
    parser.add_argument("--workloads", nargs="+", default=["32x1", "8x8", "16x8"], help="PROMPTSxGROUP")
    parser.add_argument("--new", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="0 is torch's choice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pin", action="append", default=[], metavar="OP=ID", help="for the native engine")
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter that has vLLM")
    parser.add_argument("--prompts", type=Path, help="JSON list of token id lists; made when not given")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def chain_sums(model: str, count: int) -> list[list[int]]:
    """Prompts as a chat user would ask them: reasoning-gym's chain_sum through the model's template."""
    import reasoning_gym

    from grpo_core.model.chat import Chat

    chat = Chat.from_folder(model)
    sums = reasoning_gym.create_dataset("chain_sum", seed=1, size=count)
    return [list(chat.encode([{"role": "user", "content": item["question"]}])) for item in sums]


def sizes(workload: str) -> tuple[int, int]:
    """(prompts, group) of "8x8"."""
    prompts, group = workload.split("x")
    return int(prompts), int(group)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(
    generate: Generate, prompts: Sequence[Sequence[int]], workload: str, new: int, seed: int
) -> dict[str, Any]:
    """One round of one workload."""
    count, group = sizes(workload)
    wall, cpu = time.perf_counter(), cpu_seconds()
    found = generate(prompts[:count], group, new, seed)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    tokens = sum(len(ids) for ids in found.token_ids)
    if tokens != count * group * new or [len(p) for p in found.logprobs] != [new] * (count * group):
        raise RuntimeError(f"{tokens} tokens were drawn instead of {count * group * new}")
    mean = statistics.fmean(value for row in found.logprobs for value in row)
    return {
        "workload": workload, "tokens": tokens, "wall_s": round(wall, 4), "cpu_s": round(cpu, 4),
        "tokens_per_s": round(tokens / wall, 1), "tokens_per_cpu_s": round(tokens / cpu, 1),
        "prefill_s": None if found.prefill_s is None else round(found.prefill_s, 4),
        "mean_logprob": round(mean, 4), "peak_rss_bytes": peak_rss(),
    }  # fmt: skip


def build(args: argparse.Namespace, prompts: Sequence[Sequence[int]]) -> Generate:
    """The engine, warm: one round of each workload has run."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    most = max(count * group for count, group in map(sizes, args.workloads))
    longest = max(len(ids) for ids in prompts) + args.new
    pins = dict(pin.split("=", 1) for pin in args.pin)
    generate = ENGINES[args.engine](args.model, args.dtype, most, longest, pins)
    for workload in args.workloads:
        measure(generate, prompts, workload, args.new, seed=1)
    return generate


def serve(args: argparse.Namespace, prompts: Sequence[Sequence[int]]) -> None:
    """Run the workloads named on standard input, one JSON line each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print to standard output
    generate = build(args, prompts)
    print("{}", file=out, flush=True)
    for seed, line in enumerate(sys.stdin, start=2):
        print(
            json.dumps(measure(generate, prompts, line.strip(), args.new, seed * 10**6)), file=out, flush=True
        )


def start(engine: str, args: argparse.Namespace, prompts: Path) -> subprocess.Popen[str]:
    """A process that serves one engine, once it is warm."""
    python = args.vllm_python if engine.startswith("vllm") else sys.executable
    command = [
        python, __file__, "--serve", "--engine", engine, "--model", args.model, "--prompts", str(prompts),
        "--workloads", *args.workloads, "--new", str(args.new), "--dtype", args.dtype,
        "--threads", str(args.threads), *(f"--pin={pin}" for pin in args.pin),
    ]  # fmt: skip
    # Threads of an engine that waits for its turn must not spin.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    ask(process)
    return process


def ask(process: subprocess.Popen[str], workload: str = "") -> dict[str, Any]:
    """One answer of a serving process."""
    if workload and process.stdin:
        process.stdin.write(workload + "\n")
        process.stdin.flush()
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise SystemExit(f"an engine ended without an answer (exit status {process.wait()})")
    answer: dict[str, Any] = json.loads(line)
    return answer


def compare(args: argparse.Namespace, prompts: Path) -> dict[str, Any]:
    """All engines in turns; medians by workload and engine, and their ratios to the first engine."""
    processes = {engine: start(engine, args, prompts) for engine in args.compare}
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {
        workload: {engine: [] for engine in args.compare} for workload in args.workloads
    }
    order = random.Random(0)
    try:
        for _ in range(args.rounds):
            for workload in args.workloads:
                for engine in order.sample(args.compare, len(args.compare)):
                    rounds[workload][engine].append(ask(processes[engine], workload))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {workload: summary(rows, args.compare[0]) for workload, rows in rounds.items()}


def summary(rows: Mapping[str, Sequence[Mapping[str, Any]]], first: str) -> dict[str, Any]:
    """Medians of each engine, and how many times faster `first` is."""
    keys = (
        "tokens_per_s",
        "tokens_per_cpu_s",
        "wall_s",
        "cpu_s",
        "prefill_s",
        "mean_logprob",
        "peak_rss_bytes",
    )
    table = {
        engine: {
            key: statistics.median(row[key] for row in found) if found[0][key] is not None else None
            for key in keys
        }
        | {"walls_s": [row["wall_s"] for row in found]}
        for engine, found in rows.items()
    }
    times = {
        engine: {
            key: round(table[first][key] / table[engine][key], 2)
            for key in ("tokens_per_s", "tokens_per_cpu_s")
        }
        for engine in table
        if engine != first
    }
    return {"engines": table, f"{first}_is_faster_by": times}


def main() -> None:
    args = parse_args()
    most = max(sizes(workload)[0] for workload in args.workloads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.prompts or Path(folder) / "prompts.json"
        if args.prompts is None:
            path.write_text(json.dumps(chain_sums(args.model, most)))
        prompts = json.loads(path.read_text())
        if args.serve:
            serve(args, prompts)
            return
        facts = {
            "new": args.new, "dtype": args.dtype, "threads": args.threads,
            "prompt_tokens": round(statistics.fmean(len(ids) for ids in prompts), 1), "machine": machine(),
        }  # fmt: skip
        if args.compare:
            emit({**facts, "rounds": args.rounds, "workloads": compare(args, path)})
            return
        generate = build(args, prompts)
        for workload in args.workloads:
            for seed in range(args.rounds):
                emit({"engine": args.engine, **measure(generate, prompts, workload, args.new, seed), **facts})


if __name__ == "__main__":
    main()
