"""Settings that are each valid but make no sense together."""

from __future__ import annotations

import string
from collections.abc import Iterator

from .config import Config

Finding = tuple[str, str]
"""Dotted key to blame, and the message."""


def cross_checks(config: Config) -> tuple[list[Finding], list[Finding]]:
    """Errors and warnings."""
    return list(_errors(config)), list(_warnings(config))


def _errors(config: Config) -> Iterator[Finding]:
    algo, rollout = config.algo, config.rollout
    if algo.group_size == 1 and algo.advantage in ("group_norm", "group_mean"):
        yield (
            "algo.group_size",
            f"algo.group_size 1 with algo.advantage {algo.advantage}: completions are compared within their"
            " group, so every advantage is 0 and nothing is learned; use 2 or more",
        )
    if 0 < algo.clip_dual <= 1:
        yield (
            "algo.clip_dual",
            f"algo.clip_dual {algo.clip_dual:g} would cut every update with a negative advantage;"
            " use 0 (off) or a value above 1, commonly 3",
        )
    if algo.mini_batches > rollout.prompts:
        yield (
            "algo.mini_batches",
            f"algo.mini_batches {algo.mini_batches} is more than the {rollout.prompts} groups of a step"
            " (rollout.prompts); a mini-batch holds one whole group at least",
        )
    if rollout.min_tokens > rollout.max_tokens:
        yield (
            "rollout.min_tokens",
            f"rollout.min_tokens {rollout.min_tokens} is above rollout.max_tokens {rollout.max_tokens}",
        )
    if rollout.temperature == 0 and algo.group_size > 1:
        yield (
            "rollout.temperature",
            f"rollout.temperature 0 makes all {algo.group_size} completions of a prompt equal,"
            " so every advantage is 0; use a value above 0, commonly 1",
        )
    if config.eval.every and not config.data.eval:
        yield "eval.every", "eval.every is set but data.eval is empty: there is nothing to evaluate on"
    if all(reward.weight == 0 for reward in config.rewards):
        yield "rewards", "every reward has weight 0: the total is always 0 and nothing is learned"
    yield from _run_dir(config)


def _run_dir(config: Config) -> Iterator[Finding]:
    try:
        names = {field for _, field, _, _ in string.Formatter().parse(config.run.dir) if field is not None}
    except ValueError as error:
        yield "run.dir", f"run.dir {config.run.dir!r} is not a pattern: {error}"
        return
    odd = sorted(names - {"name", "time"})
    if odd:
        yield "run.dir", f"run.dir knows {{name}} and {{time}}, not {{{odd[0]}}}"


def _warnings(config: Config) -> Iterator[Finding]:
    algo, rollout, train = config.algo, config.rollout, config.train
    if rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0:
        key = "top_p" if rollout.top_p < 1 else "top_k" if rollout.top_k else "min_p"
        yield (
            f"rollout.{key}",
            f"rollout.{key} filters the sampled tokens, so rollout and trainer log-probs differ by design",
        )
    if config.consistent and rollout.min_tokens > 0:
        yield (
            "rollout.min_tokens",
            f"rollout.min_tokens {rollout.min_tokens} keeps end tokens from being drawn, which the"
            " trainer does not know: up to there log-probs differ, in spite of consistent: true",
        )
    updates = train.steps * algo.mini_batches * algo.epochs
    if train.warmup_steps >= updates:
        yield (
            "train.warmup_steps",
            f"train.warmup_steps {train.warmup_steps} is not below the run's {updates} optimizer steps:"
            " the learning rate never reaches train.lr",
        )
    if train.min_lr_ratio > 0 and train.schedule == "constant":
        yield "train.min_lr_ratio", "train.min_lr_ratio has no effect with train.schedule constant"
    if train.lr > 1e-3:
        yield "train.lr", f"train.lr {train.lr:g} is far above what policy updates bear (1e-6 to 1e-4)"
    if algo.clip_low >= 1:
        yield (
            "algo.clip_low",
            f"algo.clip_low {algo.clip_low:g}: ratios are never below 0, so this clips nothing",
        )
    if config.data.eval and not config.eval.every:
        yield "data.eval", "data.eval is set but eval.every is 0: it is never evaluated"
    if train.routing_replay == "R2" and algo.mini_batches * algo.epochs == 1:
        yield (
            "train.routing_replay",
            "train.routing_replay R2 replays the pass that takes the old log-probs,"
            " which a step of one update (algo.mini_batches 1, algo.epochs 1) does not need;"
            " R3 replays the rollout",
        )
    if algo.epochs > 4:
        yield (
            "algo.epochs",
            f"algo.epochs {algo.epochs} reuses a rollout often; most of it will be clipped",
        )
