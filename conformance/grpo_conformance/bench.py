"""`grpo bench op NAME`: the figures behind the ranks of an op's offers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo_core.cli.table import print_table
from grpo_core.errors import ConfigError
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plugin_checks import did_you_mean

if TYPE_CHECKING:
    from grpo_core.catalogue import Offer

    from .case import Case, Target

KINDS = ("op",)
SLOWEST = 300.0
"""Seconds that one offer may take, building its kernels included."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo bench`."""
    parser.usage = "grpo bench op NAME [--device D] [--dtype T] [--size NAME=VALUE ...] [--backward] [--json]"
    parser.add_argument("words", nargs="+", metavar="op NAME", help="what is timed: an op such as norm.rms")
    parser.add_argument("--device", default="auto", help="name of a device (default: auto)")
    parser.add_argument("--dtype", default="", help="bfloat16, float16, float32 or float64")
    parser.add_argument("--size", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="sizes other than the usual ones, which the table names")  # fmt: skip
    parser.add_argument("--backward", action="store_true", help="time a forward and a backward pass together")
    parser.add_argument("--quick", action="store_true", help="small sizes and few samples")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 where at least one offer was timed and none broke, else 1."""
    op = _op_of(args.words)
    from .levels.speed import dtypes_of
    from .ops.table import FAMILIES
    from .speed.measure import is_large, sizes_of
    from .target import open_target

    target = open_target(args.device)
    dtypes = dtypes_of(op, target.probe.info)
    dtype = args.dtype or dtypes[0]
    if dtype not in dtypes:
        raise ConfigError(
            f"{op} cannot be timed in {dtype!r}{did_you_mean(dtype, dtypes)}",
            why=f"{target.device.name} and the op have in common: {', '.join(dtypes)}",
            fix=f"give --dtype one of these, or leave it out for {dtypes[0]}",
        )
    sizes = sizes_of(op, quick=args.quick, large=is_large(target))
    sizes = {**sizes, **_changes(args.size, sizes, op)}
    if args.backward and not CONTRACTS[op].backward and op != "moe.layer":
        differentiable = [name for name in FAMILIES if CONTRACTS[name].backward]
        raise ConfigError(
            f"{op} has no backward pass", why=f"differentiable are {', '.join(differentiable)}",
            fix="leave --backward out",
        )  # fmt: skip
    content = _measured(target, op, dtype, sizes, args)
    if args.json:
        print(json.dumps(content, indent=1))
    else:
        _print(content)
    return 0 if content["offers"] and all(row["status"] == "pass" for row in content["offers"]) else 1


def _op_of(words: Sequence[str]) -> str:
    from .speed.table import LOADS

    if words[0] not in KINDS or len(words) != 2:
        raise ConfigError(
            f"there is no benchmark {' '.join(words)!r}{did_you_mean(words[0], KINDS)}",
            why="the benchmark is `op`, and takes the name of one op",
            fix="for example `grpo bench op norm.rms`",
        )
    op = words[1]
    if op not in LOADS:
        why = "it is no call on tensors" if op in CONTRACTS else f"the ops are {', '.join(LOADS)}"
        raise ConfigError(
            f"{op!r} cannot be timed{did_you_mean(op, LOADS)}",
            why=why,
            fix="see `grpo plugins --matrix` for all ops and their offers",
        )
    return op


def _changes(pairs: Sequence[str], sizes: Mapping[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in sizes:
            raise ConfigError(
                f"{op} has no size {name!r}{did_you_mean(name, sizes)}",
                why="its sizes are " + ", ".join(f"{known}={usual}" for known, usual in sizes.items()),
                fix="write --size NAME=VALUE with one of these names",
            )
        found[name] = _value(name, value, sizes[name])
    return found


def _value(name: str, text: str, usual: Any) -> Any:
    if isinstance(usual, bool) and text in ("true", "false"):
        return text == "true"
    if isinstance(usual, str) and text:
        return text
    if isinstance(usual, int) and not isinstance(usual, bool) and text.isdecimal() and int(text) > 0:
        return int(text)
    wanted = "true or false" if isinstance(usual, bool) else "a word" if isinstance(usual, str) else (
        "a whole number above 0")  # fmt: skip
    raise ConfigError(f"size {name} cannot be {text!r}", why=f"it is {usual!r} usually", fix=f"give {wanted}")


def _measured(
    target: Target, op: str, dtype: str, sizes: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    from .speed.measure import refusal
    from .worker import Worker

    timed: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    worker = Worker(target.device.name)
    try:
        offers = target.catalogue.offers.get(op, ())
        for offer in sorted(offers, key=lambda one: (-one.impl.rank, one.id)):
            row = {"offer": offer.id, "rank": offer.impl.rank}
            why = refusal(target, offer, sizes, dtype, backward=args.backward)
            if why is not None:
                refused.append({**row, "reason": why})
                continue
            outcome = worker.run(_case(offer, dtype, sizes, args))
            found = {"status": outcome.status, "message": outcome.message, **outcome.figures}
            timed.append({**row, **found})
    finally:
        worker.close()
    base = next((row.get("seconds") for row in timed if row["rank"] == 0), None)
    for row in timed:
        row["times_reference"] = base / row["seconds"] if base and "seconds" in row else None
    return {
        "op": op, "device": target.device.name, "name": target.probe.info.name, "dtype": dtype,
        "sizes": dict(sizes), "backward": args.backward, "offers": timed, "refused": refused,
    }  # fmt: skip


def _case(offer: Offer, dtype: str, sizes: Mapping[str, Any], args: argparse.Namespace) -> Case:
    from .case import Case

    op = offer.impl.op
    return Case(
        id=f"bench/{op}/{offer.id}", level=6, subject=f"{op} {offer.id}", room=offer.plugin,
        run="grpo_conformance.levels.speed:speed", timeout=SLOWEST,
        args={"op": op, "offer_id": offer.id, "dtype": dtype, "sizes": dict(sizes), "quick": args.quick,
              "backward": args.backward},
    )  # fmt: skip


COLUMNS = ("offer", "rank", "time", "GB/s", "GFLOP/s", "of copy", "of matmul", "of bound", "x reference")


def _print(content: Mapping[str, Any]) -> None:
    what = "forward and backward" if content["backward"] else "forward"
    print(f"{content['op']} in {content['dtype']} on {content['device']} ({content['name']}), {what}")
    print("  " + " ".join(f"{name}={value}" for name, value in content["sizes"].items()) + "\n")
    good = [row for row in content["offers"] if row["status"] == "pass"]
    if good:
        print_table(COLUMNS, [_cells(row) for row in good])
        copy = max(row["copy_bytes_per_second"] for row in good) / 1e9
        product = max(row["matmul_flops_per_second"] for row in good) / 1e9
        print(f"\ncopy {copy:.1f} GB/s, matmul {product:.0f} GFLOP/s at best; each share is of the figures")
        print("measured beside that offer; of bound: the least time that both allow, over the time taken")
    for row in content["offers"]:
        if row["status"] != "pass":
            print(f"\n{row['offer']} (rank {row['rank']}): {row['status']}: {row['message']}")
    if content["refused"]:
        print()
        rows = [[row["offer"], str(row["rank"]), row["reason"]] for row in content["refused"]]
        print_table(["refused", "rank", "why"], rows)


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = row["times_reference"]
    return [
        row["offer"], str(row["rank"]), duration(row["seconds"]), f"{row['bytes_per_second'] / 1e9:.2f}",
        f"{row['flops_per_second'] / 1e9:.1f}", percent(row["share_of_copy"]),
        percent(row["share_of_matmul"]), percent(row["share_of_bound"]),
        f"{times:.2f}" if times else "-",
    ]  # fmt: skip


def duration(seconds: float) -> str:
    """ "1.24 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def percent(share: float) -> str:
    """ "37 %"."""
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"
