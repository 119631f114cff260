"""Our GRPO step, phase by phase. Prints one JSON line.

    python benchmarks/bench_step.py --model DIR --data prompts.jsonl --prompts 8 --group 8 --completion 64

It is the product's own loop (`grpo_core.loop`), with the parts that `grpo train` would build, and completions
of a fixed length.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import yaml
from common import Job, add_job_arguments, emit, job_from, record

from grpo_core import loop
from grpo_core.config_loader import parse_config
from grpo_core.planning import PlannedRun, plan_run
from grpo_core.session import build_parts


def settings(job: Job, overrides: list[str]) -> PlannedRun:
    """The planned run of a job; `overrides` are further `key=value` settings."""
    tree: dict[str, Any] = {
        "model": job.model,
        "data": {"train": job.data, "shuffle": False, "options": {"plain": True}},
        "rewards": [{"name": "number"}],
        "algo": {"group_size": job.group},
        "rollout": {
            "prompts": job.prompts,
            "max_tokens": job.completion,
            "min_tokens": job.completion,
        },
        "train": {"steps": job.steps + job.warmup, "lr": 1e-6, "dtype": job.dtype},
        "run": {"threads": job.threads},
    }
    return plan_run(parse_config(yaml.safe_dump(tree), "benchmark", overrides))


def one_step(parts: loop.Parts, step: int) -> dict[str, float]:
    """Seconds by phase of one step, as `loop.train` runs it."""
    clock = loop.Clock()
    began = time.perf_counter()
    scored = loop.experience(parts, step, clock)
    loop.learn(parts, step, scored, clock)
    with clock.phase("sync"):
        parts.rollout.load_weights(parts.trainer.weights(), step + 1)
    seconds = dict(clock.seconds)
    seconds["step"] = time.perf_counter() - began
    seconds["other"] = seconds["step"] - sum(clock.seconds.values())
    prompts = {item.completion.prompt_id: len(item.prompt_token_ids) for item in scored}
    seconds["prompt_tokens"] = float(sum(prompts.values()))
    lengths = {len(item.completion.token_ids) for item in scored}
    if lengths != {parts.config.rollout.max_tokens}:
        raise RuntimeError(f"completions have lengths {sorted(lengths)}: the work is not the fixed one")
    return seconds


def main() -> int:
    """Run the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_job_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    job = job_from(args)
    began = time.perf_counter()
    planned = settings(job, args.overrides)
    parts = build_parts(planned)
    parts.rollout.load_weights(parts.trainer.weights(), 0)
    startup = time.perf_counter() - began
    steps = [one_step(parts, step) for step in range(job.warmup + job.steps)]
    parts.rewards.close()
    emit(
        record(
            "grpo-core", job, steps[job.warmup :],
            startup_s=round(startup, 3), first_step_s=round(steps[0]["step"], 3),
            prompt_tokens=steps[0]["prompt_tokens"], overrides=args.overrides,
            ops={choice.op: choice.chosen for choice in planned.plan.choices},
            memory_stats_peak=parts.memory.stats().peak,
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
