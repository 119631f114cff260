"""`python -m grpo_conformance.cann [options] -- COMMAND ...` runs a command with a simulated CANN."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from grpo_core.errors import GrpoError

from .limits import LIMITS
from .run import Machine, environment, run


def main(words: Sequence[str]) -> int:
    """The exit code of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_conformance.cann",
        description="Runs COMMAND with the installed torch-npu on a simulated CANN.",
        epilog="Limits: " + " ".join(f"{number}. {text}" for number, text in enumerate(LIMITS, 1)),
    )
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="NPUs (2)")
    parser.add_argument("--memory", type=float, default=4.0, metavar="GIB", help="memory of each, in GiB (4)")
    parser.add_argument("--soc", default="Ascend910B3", help="name of the chip (Ascend910B3)")
    parser.add_argument("--print-env", action="store_true", help="print what a shell has to export, and end")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --")
    chosen = parser.parse_args(words)
    machine = Machine(devices=chosen.devices, memory_bytes=int(chosen.memory * 2**30), soc=chosen.soc)
    if chosen.print_env:
        for name, value in environment(machine).items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    if not chosen.command:
        parser.error("no COMMAND is given")
    print("simulated CANN: nothing here is measured on an NPU; limits: --help", file=sys.stderr)
    return run(chosen.command, machine)


def shown() -> int:
    """`main` with the program's words; an error of ours is shown as the command line shows it."""
    try:
        return main(sys.argv[1:])
    except GrpoError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(shown())
