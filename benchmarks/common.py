"""What both sides of a comparison share: the job, the record, memory. Standard library only, because the
peer runs in an interpreter of its own."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PHASES = ("rollout", "reward", "logprob", "train", "sync", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One workload: every completion has exactly `completion` tokens, so the work does not depend on luck."""

    model: str
    """Folder in Hugging Face layout."""
    data: str
    """JSONL with `prompt` (text or messages) and `answer`."""
    prompts: int
    group: int
    completion: int
    dtype: str
    """"bfloat16" computes in bfloat16 over float32 master weights; "float32" throughout."""
    threads: int
    """0 is torch's choice."""
    steps: int
    warmup: int

    def flags(self) -> list[str]:
        """The command-line arguments that give this job."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `job_from` reads."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1)


def job_from(args: argparse.Namespace) -> Job:
    """The job of parsed arguments."""
    return Job(**{name: getattr(args, name) for name in Job.__dataclass_fields__})


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss survives exec on Linux, so a child of a large process would inherit its figure.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median over the steps of each key; a key that a step lacks counts as 0."""
    keys = sorted({key for step in steps for key in step})
    return {key: round(statistics.median(step.get(key, 0.0) for step in steps), 5) for key in keys}


def record(name: str, job: Job, steps: Sequence[Mapping[str, float]], **more: Any) -> dict[str, Any]:
    """The result of one run: medians, every step's seconds, tokens, memory, machine."""
    middle = medians(steps)
    tokens = job.prompts * job.group * job.completion
    return {
        "name": name,
        "job": asdict(job),
        "step_s": middle["step"],
        "phases_s": {phase: middle.get(phase, 0.0) for phase in PHASES},
        "steps_s": [round(step["step"], 5) for step in steps],
        "completion_tokens": tokens,
        "rollout_tokens_per_s": round(tokens / middle["rollout"], 2),
        "peak_rss_bytes": peak_rss(),
        "load": round(os.getloadavg()[0], 2),
        "machine": machine(),
        **more,
    }


def machine() -> dict[str, Any]:
    """The processor and what of it may be used."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    }


def emit(result: Mapping[str, Any]) -> None:
    """Print a result as the one JSON line on standard output."""
    print(json.dumps(result), flush=True)


def last_json(text: str) -> dict[str, Any]:
    """The last line of `text` that is a JSON object. Raises ValueError when there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise ValueError("no JSON line in the output")
