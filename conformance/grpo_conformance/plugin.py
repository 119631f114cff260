"""The commands of the conformance suite, for the `grpo_commands` hook."""

from __future__ import annotations

import argparse

from grpo_core.hookspecs import hookimpl
from grpo_core.registry import CommandRegistry


@hookimpl
def grpo_commands(cli: CommandRegistry) -> None:
    """`grpo conformance`."""
    cli.command("conformance", "check a device or a model plugin against the contracts", _configure, _run)


def _configure(parser: argparse.ArgumentParser) -> None:
    from .cli import configure

    configure(parser)


def _run(args: argparse.Namespace) -> int:
    from .cli import run

    return run(args)
