"""`grpo report run/ [other/ ...] [--twin run/] [-o report.html]`."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several are overlaid")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="PAGE.HTML",
        help="where to write it (default: report.html of the first run)",
    )
    parser.add_argument(
        "--twin",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="a run like the first, from weights changed by a rounding: how far right runs may be apart",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is. Raises `ConfigError` for a folder without metrics."""
    from ..report.html import write_report

    print(write_report(args.runs, args.out or args.runs[0] / "report.html", twins=args.twin))
    return 0
