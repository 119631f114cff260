"""Training and decoding of every model family against transformers, at sizes a CPU can train.

    python benchmarks/bench_family.py --size small --rounds 5
    python benchmarks/bench_family.py --size medium --families qwen3-moe qwen3-next --dtype float32

Three jobs a family: `even`, forward and backward over sequences of one length (the same arithmetic on both
sides); `grpo`, the same over a GRPO batch (we pack it and compute a group's prompt once, transformers pads);
`decode`, completions of a fixed length. transformers runs once with each of its attention and experts
implementations; the fastest then takes turns with ours. Figures are medians; one table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import emit, machine
from family_models import FAMILIES, SIZES, SPARSE, write_model
from family_work import (
    EXPERTS,
    Run,
    Work,
    even_work,
    grpo_work,
    our_decoding,
    our_training,
    peer_settings,
    product_flops,
    their_decoding,
    their_training,
)

Clock = Callable[[], float]
JOBS = ("even", "grpo", "decode")
TARGETS = {"dense": 1.5, "sparse": 3.0}
SAME = {"float32": 1e-3, "bfloat16": 0.05}
"""How far the mean log-probabilities of both sides may lie apart: near ln V, rounded to 24 or 8 bits."""
TRIALS = 1
SQUARE = 2048
CLOCKS = {"wall": (time.perf_counter, statistics.median), "cpu": (time.process_time, min)}
"""What reads the time, and what is made of the rounds."""


def main() -> int:
    """Run the jobs and print the table and the JSON line."""
    args = arguments()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for family in args.families:
        with tempfile.TemporaryDirectory() as name:
            folder = write_model(Path(name), family, SIZES[args.size])
            for job in args.jobs:
                rows.append({"family": family, "job": job, **measure(family, job, folder, args)})
                print(f"{family:12} {job:7} {rows[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    result = {
        "size": args.size, "dtype": args.dtype, "clock": args.clock, "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "sizes": {name: getattr(SIZES[args.size], name) for name in SIZES[args.size].__slots__},
        "torch": torch.__version__, "transformers": transformers.__version__, "machine": machine(),
        "targets": TARGETS, "rows": rows,
    }  # fmt: skip
    show(rows)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    emit(result)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="0 is torch's choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall",
                        help="`cpu`: CPU seconds and minima, for cores that others use too")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=2048, help="of `even`, and about those of `grpo`")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion in `decode`")
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=list(EXPERTS[:2]),
                        help="experts implementations to try for transformers")  # fmt: skip
    parser.add_argument("--pin", action="append", default=[], metavar="OP=ID", help="for our plan")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    return parser.parse_args()


def measure(family: str, job: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one job in turns: tokens per second and their ratio."""
    pins = dict(pin.split("=", 1) for pin in args.pin)
    tokens, ours, make = contenders(job, folder, args, pins)
    clock, middle_of = CLOCKS[args.clock]
    best, tried = fastest(make, peer_settings(family, args.experts), clock)
    theirs = make(best)
    check_same(job, args.dtype, ours(), theirs())
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(args.rounds):
        sides = [("ours", ours), ("theirs", theirs)]
        for side, run in sides if number % 2 else sides[::-1]:
            seconds[side].append(timed(run, clock))
    middle = {side: middle_of(found) for side, found in seconds.items()}
    return {
        "tokens": tokens,
        "ours_tokens_per_s": round(tokens / middle["ours"], 1),
        "theirs_tokens_per_s": round(tokens / middle["theirs"], 1),
        "ratio": round(middle["theirs"] / middle["ours"], 2),
        "target": TARGETS["sparse" if family in SPARSE else "dense"],
        **bound(job, folder, args, clock, middle["theirs"]),
        "their_settings": best,
        "their_settings_s": tried,
        "seconds": {side: [round(value, 4) for value in found] for side, found in seconds.items()},
    }


def bound(job: str, folder: Path, args: argparse.Namespace, clock: Clock, theirs: float) -> dict[str, float]:
    """The ratio of a side that computes nothing but the products of `even`, as fast as torch a square one.

    In float32 that bounds nothing: on some CPUs torch's products are half as fast as ours."""
    if job != "even" or args.dtype != "bfloat16":
        return {}
    import torch

    a, b = (torch.ones(SQUARE, SQUARE, dtype=getattr(torch, args.dtype)) for _ in range(2))
    square = min(timed(lambda: float(torch.mm(a, b)[0, 0]), clock) for _ in range(args.rounds + 2))
    flops = product_flops(folder, training_work(job, args.tokens))
    return {
        "at_most": round(theirs / (flops / (2 * SQUARE**3 / square)), 2),
        "product_gflop": round(flops / 1e9, 2),
    }


def contenders(
    job: str, folder: Path, args: argparse.Namespace, pins: Mapping[str, str]
) -> tuple[int, Run, Callable[[Mapping[str, str]], Run]]:
    """(tokens of the work, our side, transformers' side as a function of its settings)."""
    if job == "decode":
        draw = random.Random(2)
        prompts = [[draw.randrange(4, 4096) for _ in range(draw.randint(24, 48))] for _ in range(8)]
        group = 8
        ours = our_decoding(folder, args.dtype, prompts, group, args.new, pins)
        return len(prompts) * group * args.new, ours, lambda settings: their_decoding(
            folder, args.dtype, prompts, group, args.new, settings
        )  # fmt: skip
    work = training_work(job, args.tokens)
    return work.tokens, our_training(folder, args.dtype, work, pins), lambda settings: their_training(
        folder, args.dtype, work, settings
    )  # fmt: skip


def training_work(job: str, tokens: int) -> Work:
    """Sequences of 128 tokens; or groups of 8 with prompts of 64 and completions of 16 to 64."""
    if job == "even":
        return even_work(max(1, tokens // 128), 128)
    return grpo_work(max(1, tokens // (8 * 104)), 8, 64, 64)


def fastest(
    make: Callable[[Mapping[str, str]], Run], settings: Sequence[dict[str, str]], clock: Clock
) -> tuple[dict[str, str], dict[str, float]]:
    """The settings that took least, and the seconds of all of them."""
    tried: dict[str, float] = {}
    by_label = {"+".join(one.values()): one for one in settings}
    for label, one in by_label.items():
        run = make(one)
        first = timed(run, clock)
        # A first run that takes half as long again as the best so far is not made good by being warm.
        hopeless = bool(tried) and first > 1.5 * min(tried.values())
        again = () if hopeless else (timed(run, clock) for _ in range(TRIALS))
        tried[label] = round(min([first, *again]), 4)
    return by_label[min(tried, key=tried.__getitem__)], tried


def timed(run: Run, clock: Clock) -> float:
    """Seconds of one run."""
    began = clock()
    run()
    return clock() - began


def check_same(job: str, dtype: str, ours: float, theirs: float) -> None:
    """Raises RuntimeError when the sides did not do the same work. Drawn tokens differ, hence their mean."""
    allowed = 0.5 if job == "decode" else SAME[dtype]
    if not abs(ours - theirs) <= allowed:
        raise RuntimeError(f"{job}: mean log-probabilities {ours} and {theirs}: the sides did different work")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Ratios, tokens per second, and what transformers ran with, as a Markdown table."""
    print(
        "| family | job | grpo-core tok/s | transformers tok/s | ratio | aim | at most | transformers with |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        with_ = ", ".join(row["their_settings"].values())
        print(
            f"| {row['family']} | {row['job']} | {row['ours_tokens_per_s']:.0f} |"
            f" {row['theirs_tokens_per_s']:.0f} | {row['ratio']:.2f} | {row['target']} |"
            f" {row.get('at_most', '')} | {with_} |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
