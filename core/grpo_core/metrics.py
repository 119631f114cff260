"""Metrics of one step from its completions and its optimizer steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .types import Scored, StepMetrics


def completion_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Rewards and lengths of the step's completions.

    `reward/zero_std_groups` is the share of groups whose rewards are all equal: they teach nothing.
    `length/clipped` is the share of completions cut at the token limit.
    """
    rewards = [item.reward for item in scored]
    lengths = [len(item.completion.token_ids) for item in scored]
    groups: dict[int, set[float]] = {}
    for item in scored:
        groups.setdefault(item.completion.prompt_id, set()).add(item.reward)
    row = {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/zero_std_groups": sum(len(seen) == 1 for seen in groups.values()) / len(groups),
        "length/mean": statistics.fmean(lengths),
        "length/max": float(max(lengths)),
        "length/clipped": sum(item.completion.finish_reason == "length" for item in scored) / len(scored),
        "prompt_length/mean": statistics.fmean(len(item.prompt_token_ids) for item in scored),
        "advantage/max": max(item.advantage for item in scored),
        "advantage/min": min(item.advantage for item in scored),
    }
    for name in scored[0].rewards:
        row[f"reward/{name}/mean"] = statistics.fmean(item.rewards[name] for item in scored)
    return row


RENAMED = {
    "policy_loss": "policy/loss",
    "loss": "policy/total_loss",
    "tokens": "policy/tokens",
    "mismatch/gap_mean": "mismatch/logprob_gap_mean",
    "mismatch/gap_max": "mismatch/logprob_gap_max",
    "mismatch/gap_p99": "mismatch/logprob_gap_p99",
}
"""Trainers' names in metrics.jsonl; any other name without a slash goes under `policy/`."""

ROUTING, ROUTING_MAX = "mismatch/routing_changed", "policy/routing_changed_max"


def row_name(name: str) -> str:
    """Where a trainer's metric stands in metrics.jsonl."""
    return RENAMED.get(name, name if "/" in name else f"policy/{name}")


def merge_step_metrics(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Metrics of a step's optimizer steps: the highest of a maximum, the mean of the others.

    The gap between rollout and trainer is that of the first optimizer step, where both hold the same
    weights; of the experts that differ, the largest share is given, too, where there are several steps.
    """
    row: dict[str, float] = {}
    for name in steps[0].values:
        values = [step.values[name] for step in steps]
        if name.startswith("mismatch/"):
            row[row_name(name)] = values[0]
            if name == ROUTING and len(steps) > 1:
                row[ROUTING_MAX] = max(values)
        elif name.endswith("_max"):
            row[row_name(name)] = max(values)
        else:
            row[row_name(name)] = statistics.fmean(values)
    return row
