"""The part of `grpo plan` that tells a model's size, and what one rank of a layout holds of it."""

from __future__ import annotations

import argparse
from typing import Any

from ..model.arch import Arch
from ..model.layout import Layout, rank_bytes
from ..model.scale import active_parameters, items, mtp_parameters, total_parameters
from .table import print_table

OPTIONS = (
    ("--dp", "data", "data parallel ranks"),
    ("--tp", "tensor", "tensor parallel ranks"),
    ("--pp", "pipeline", "pipeline stages"),
    ("--ep", "expert", "expert parallel ranks"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a layout."""
    group = parser.add_argument_group(
        "layout", "on paper: what one rank would hold; this release trains by --dp"
    )
    for option, dest, text in OPTIONS:
        group.add_argument(option, dest=dest, type=int, default=1, metavar="N", help=text)
    group.add_argument(
        "--distributed-optimizer", action="store_true", help="share out optimizer state over equal ranks"
    )


def layout_of(args: argparse.Namespace) -> Layout:
    """The layout that the options give."""
    sizes = {dest: getattr(args, dest) for _, dest, _ in OPTIONS}
    return Layout(**sizes, distributed_optimizer=args.distributed_optimizer)


def size_json(arch: Arch, layout: Layout, dtype: str) -> dict[str, Any]:
    """Everything that `print_size` shows, in numbers. Raises `ConfigError` as `rank_bytes` does."""
    _, whole = rank_bytes(arch, Layout(), dtype=dtype)
    stage, rank = rank_bytes(arch, layout, dtype=dtype)
    return {
        "dtype": dtype,
        "parameters": {
            "total": total_parameters(arch), "active": active_parameters(arch), "mtp": mtp_parameters(arch),
        },
        "items": [
            {"name": item.name, "count": item.count, "each": item.each, "total": item.total,
             "active": item.count * item.active}
            for item in items(arch)
        ],
        "layout": {dest: getattr(layout, dest) for _, dest, _ in OPTIONS}
        | {"world": layout.world, "distributed_optimizer": layout.distributed_optimizer},
        "model": _numbers(whole),
        "rank": {"stage": stage, **_numbers(rank)},
    }  # fmt: skip


def _numbers(held: Any) -> dict[str, int]:
    names = ("weights", "gradients", "optimizer", "training", "kv_cache_token", "state_sequence")
    return {name: getattr(held, name) for name in names}


def print_size(size: dict[str, Any]) -> None:
    """The parts of the model, and the bytes of all of it and of one rank."""
    counts = size["parameters"]
    rows = [
        [row["name"], f"{row['count']}", f"{row['each']:,}", f"{row['total']:,}", f"{row['active']:,}"]
        for row in size["items"]
    ]
    rows.append(["all", "", "", f"{counts['total']:,}", f"{counts['active']:,}"])
    if counts["mtp"]:
        rows.append(["multi-token prediction, not trained", "", "", f"{counts['mtp']:,}", "0"])
    print_table(["part", "times", "parameters each", "in all", "met by a token"], rows)
    print()
    layout, rank, model = size["layout"], size["rank"], size["model"]
    spelled = " x ".join(f"{option[2:]}{layout[dest]}" for option, dest, _ in OPTIONS)
    where = f"one of {layout['world']} rank(s) ({spelled}" + (
        f", fullest stage {rank['stage']})" if layout["pipeline"] > 1 else ")"
    )
    print_table([f"bytes in {size['dtype']}", "whole model", where], [
        [text, human(model[name]), human(rank[name])]
        for name, text in (
            ("weights", "weights"), ("gradients", "gradients, float32"),
            ("optimizer", "optimizer: moments, masters' lower halves"), ("training", "these three"),
            ("kv_cache_token", "KV cache of a token"), ("state_sequence", "recurrent state of a sequence"),
        )
    ])  # fmt: skip


def human(count: int) -> str:
    """Bytes in decimal units with the exact number where it is short: "70.3 kB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.4g} {unit}"
