"""The commands of the conformance suite, for the `grpo_commands` hook."""

from __future__ import annotations

import argparse

from grpo_core.hookspecs import hookimpl
from grpo_core.registry import CommandRegistry


@hookimpl
def grpo_commands(cli: CommandRegistry) -> None:
    """`grpo conformance`, `grpo bench` and `grpo compare`."""
    cli.command("conformance", "check a device or a model plugin against the contracts", _configure, _run)
    cli.command("bench", "time the offers of an op beside a copy and a matmul", _configure_bench, _run_bench)
    cli.command(
        "compare", "train one config on several devices, in one report", _configure_compare, _run_compare
    )


def _configure(parser: argparse.ArgumentParser) -> None:
    from .cli import configure

    configure(parser)


def _run(args: argparse.Namespace) -> int:
    from .cli import run

    return run(args)


def _configure_bench(parser: argparse.ArgumentParser) -> None:
    from .bench import configure

    configure(parser)


def _run_bench(args: argparse.Namespace) -> int:
    from .bench import run

    return run(args)


def _configure_compare(parser: argparse.ArgumentParser) -> None:
    from .compare import configure

    configure(parser)


def _run_compare(args: argparse.Namespace) -> int:
    from .compare import run

    return run(args)
