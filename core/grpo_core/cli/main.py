"""`grpo`: finds the command, imports only that, and turns a `GrpoError` into three lines."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..devices import autoload
from ..errors import ConfigError, GrpoError

if TYPE_CHECKING:
    from ..catalogue import Catalogue
    from ..registry import Command

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train": ("train a model as a YAML file says", "grpo_core.cli.train"),
        "plan": ("show which offer serves each op, and why", "grpo_core.cli.plan"),
        "plugins": ("list plugins, what they offer, and what failed", "grpo_core.cli.plugins"),
        "doctor": ("check versions, devices, plugins, compiler and memory", "grpo_core.cli.doctor"),
        "report": ("write one HTML page about one or more runs", "grpo_core.cli.report"),
        "new-plugin": ("write a package of your own to start from", "grpo_core.cli.new_plugin"),
    }
)
"""Commands of core: help, and the module with `configure(parser)` and `run(args) -> int`."""
INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a user's mistake, 130 for an interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    autoload.switch_off()
    try:
        return _dispatch(words)
    except GrpoError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`grpo plugins | head`); Python would complain again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as stop:
        # argparse leaves this way after --help and for a wrong argument.
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"grpo-core {metadata.version('grpo-core')}")
        return 0
    chosen = words[0] if words else "--help"
    if chosen in COMMANDS:
        module = importlib.import_module(COMMANDS[chosen][1])
        parser = _parser(chosen, COMMANDS[chosen][0])
        module.configure(parser)
        code: int = module.run(parser.parse_intermixed_args(words[1:]))
        return code
    from ..plugins import load

    catalogue = load()
    if chosen in ("-h", "--help", "help"):
        print(_overview(catalogue))
        return 0
    return _run_plugin(_plugin_command(chosen, catalogue), words[1:])


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"grpo {name}", description=text, allow_abbrev=False)
    # Taken out of the arguments before parsing; declared here for --help.
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _overview(catalogue: Catalogue) -> str:
    rows = {name: text for name, (text, _) in COMMANDS.items()}
    for name, command in sorted(catalogue.commands.items()):
        rows[name] = f"{command.help} (plugin {catalogue.owners[f'command:{name}']})"
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {text}" for name, text in rows.items()]
    if catalogue.failures:
        lines += ["", f"{len(catalogue.failures)} plugin failure(s): see `grpo plugins`"]
    return "\n".join(
        [
            "usage: grpo COMMAND [arguments] [--debug]",
            "",
            "GRPO for language models on any chip.",
            "",
            *lines,
            "",
            "`grpo COMMAND --help` tells more; `grpo --version` the version.",
        ]
    )


def _plugin_command(name: str, catalogue: Catalogue) -> Command:
    if name in catalogue.commands:
        return catalogue.commands[name]
    from ..plugin_checks import did_you_mean
    from ..plugins import broken_plugins

    known = [*COMMANDS, *sorted(catalogue.commands)]
    broken = broken_plugins(catalogue)
    raise ConfigError(
        f"there is no command {name!r}{did_you_mean(name, known)}",
        why=f"commands: {', '.join(known)}" + (f"; broken plugins: {broken}" if broken else ""),
        fix="see `grpo --help`",
    )


def _run_plugin(command: Command, words: list[str]) -> int:
    parser = _parser(command.name, command.help)
    command.configure(parser)
    return command.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
