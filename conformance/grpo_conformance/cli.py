"""`grpo conformance`: run the suite on a device, check a report, compare two."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.cli.table import print_table
from grpo_core.errors import ConfigError

if TYPE_CHECKING:
    from .known import Known

WAYS = {
    "verify": "verify REPORT: is the file what the suite wrote?",
    "diff": "diff OLD NEW: what changed between two reports",
    "audit": "audit PLUGIN: do its calls fit the vendor's signatures?",
    "model": "model NAME: is a model family right?",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo conformance`."""
    parser.usage = (
        "grpo conformance DEVICE [options]\n"
        "       grpo conformance model NAME [options]\n"
        "       grpo conformance verify REPORT [--signers FILE --as NAME]\n"
        "       grpo conformance diff OLD NEW\n"
        "       grpo conformance audit PLUGIN\n"
        "       grpo conformance --mutants [NAME ...]"
    )
    parser.add_argument(
        "words", nargs="*", metavar="DEVICE", help="a device's name, or model, audit, verify, diff"
    )
    run = parser.add_argument_group("running")
    run.add_argument("--level", action="append", default=[], help="a name, a number or a range (0-3)")
    run.add_argument("--quick", action="store_true", help="fewer shapes: under a minute")
    run.add_argument("--known", type=Path, help="TOML file of known failures")
    run.add_argument("-k", dest="keyword", default="", help="cases that match, as in pytest")
    run.add_argument("-x", dest="first", action="store_true", help="stop at the first failure")
    run.add_argument("--lf", action="store_true", help="only what failed last time")
    run.add_argument("--collect-only", action="store_true", help="list the cases")
    run.add_argument("-n", dest="workers", default="", help="processes, with pytest-xdist installed")
    run.add_argument(
        "--mutants",
        nargs="*",
        metavar="NAME",
        help="does the suite notice known faults? (all, names, levels)",
    )
    run.add_argument(
        "--draws", type=int, default=20, help="values that the healthy device gets with --mutants (20)"
    )
    out = parser.add_argument_group("writing")
    out.add_argument("--json", type=Path, help="the report")
    out.add_argument("--html", type=Path, help="the report as one page")
    out.add_argument("--junit", type=Path, help="JUnit XML")
    out.add_argument("--sign", type=Path, metavar="KEY", help="sign the report with an SSH private key")
    check = parser.add_argument_group("verifying")
    check.add_argument("--signers", type=Path, help="allowed signers, as in ssh-keygen(1)")
    check.add_argument("--as", dest="identity", default="", help="whose signature it must be")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 for a pass, 1 for a verdict that is not one, 2 for a mistake."""
    for out in filter(None, (args.json, args.html, args.junit)):
        _check_room(out)
    if args.sign:
        from .sign import sign

        sign({}, args.sign)  # so that a key that cannot is told before the run, not after it
    if args.mutants is not None and not args.words:
        from .mutants import command

        return command.run(args.mutants, draws=args.draws, out=args.json, key=args.sign)
    if not args.words or args.mutants is not None:
        raise ConfigError(
            "grpo conformance takes a device, or --mutants without one",
            why="mutants are faults of the simulated device",
            fix="see `grpo conformance --help`",
        )
    way, rest = args.words[0], args.words[1:]
    wanted = {"verify": 1, "diff": 2, "audit": 1, "model": 1}.get(way, 0)
    if len(rest) != wanted:
        raise ConfigError(
            f"grpo conformance {way} takes {wanted} argument(s), not {len(rest)}",
            why="; ".join(WAYS.values()),
            fix="see `grpo conformance --help`",
        )
    if way == "verify":
        return _verify(Path(rest[0]), args)
    if way == "audit":
        return _audit(rest[0])
    if way == "diff":
        return _diff(Path(rest[0]), Path(rest[1]))
    if way == "model":
        return _suite("cpu", args, rest[0])
    return _suite(way, args)


def _verify(path: Path, args: argparse.Namespace) -> int:
    from .report import MUTANTS, SCHEMA, read
    from .sign import problem

    if bool(args.signers) != bool(args.identity):
        raise ConfigError(
            "a signature is checked against a file and a name",
            why="only one of --signers and --as is given",
            fix="give both, or neither to check the digest alone",
        )
    content = read(path, SCHEMA, MUTANTS)
    found = problem(content, signers=args.signers, identity=args.identity)
    if found:
        print(f"{path}: not valid: {found}")
        return 1
    how = f"signed by {args.identity}" if args.signers else "digest only; who wrote it is not checked"
    print(f"{path}: valid ({how}); verdict {content['verdict']}")
    return 0


def _audit(plugin: str) -> int:
    from grpo_core.plugins import load

    from .audit.run import audit_plugin, report

    result = audit_plugin(plugin, load())
    report(plugin, result)
    return 1 if result.findings else 0


def _diff(old: Path, new: Path) -> int:
    from .diff import compare
    from .report import read

    rows = compare(read(old), read(new))
    if not rows:
        print("no case changed its verdict")
        return 0
    print_table(["case", "old", "new", ""], [[row.case, row.old, row.new, row.note] for row in rows])
    return 1 if any(row.worse for row in rows) else 0


def _suite(device: str, args: argparse.Namespace, model: str = "") -> int:
    try:
        import pytest
    except ImportError:
        raise ConfigError(
            "the conformance suite needs pytest",
            why="its cases are items of pytest",
            fix="pip install pytest",
        ) from None
    import datetime

    from . import collect, model_cases
    from .known import read_known
    from .pytest_glue import Results
    from .target import open_target

    # Asked first: pytest would tell a bad file as an error of its own.
    entries = read_known(args.known, today=datetime.date.today()) if args.known else ()
    levels = (model_cases if model else collect).pick_levels(args.level)
    target = open_target(device)
    subject = model_cases.find(model, target.catalogue) if model else None
    results = Results()
    words = _pytest_words(device, levels, args) + (["--conformance-model", model] if model else [])
    code = pytest.main(words, plugins=[results])
    if args.collect_only or code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        return int(code)
    return _finish(target, results, levels, args, entries, subject)


def _check_room(out: Path) -> None:
    """A run of minutes is not to end without a place for its report."""
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(
            f"{out} cannot be written",
            why="it is a folder" if out.is_dir() else f"there is no folder {out.parent}",
            fix="name a file in a folder that exists",
        )


def _pytest_words(device: str, levels: Sequence[int], args: argparse.Namespace) -> list[str]:
    suite = Path(__file__).with_name("suite.py")
    words = [str(suite), "-p", "grpo_conformance.pytest_glue", "-c", os.devnull, f"--rootdir={Path.cwd()}"]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-q", "--tb=short"]
    words += ["-o", f"cache_dir={Path.cwd() / '.grpo_conformance'}"]
    words += ["--conformance-device", device, "--conformance-levels", ",".join(map(str, levels))]
    words += ["-k", args.keyword] if args.keyword else []
    words += ["-n", args.workers] if args.workers else []
    words += ["--conformance-known", str(args.known)] if args.known else []
    words += [f"--junitxml={args.junit}", "-o", "junit_family=xunit1"] if args.junit else []
    chosen = {"--conformance-quick": args.quick, "-x": args.first, "--lf": args.lf}
    words += [word for word, given in chosen.items() if given]
    return [*words, "--collect-only"] if args.collect_only else words


def _finish(
    target: Any, results: Any, levels: Sequence[int], args: argparse.Namespace, entries: Sequence[Known],
    subject: Any = None,
) -> int:  # fmt: skip
    from . import model_cases
    from .html import page
    from .known import STALE, advice, told
    from .report import build, write
    from .sign import sign

    rows = [results.found[case_id] for case_id in results.collected if case_id in results.found]
    everything = [case.id for case in _whole(target, subject)] if entries else []
    known = told(entries, {case.id: outcome.status for case, outcome in rows}, everything)
    command = shlex.join(["grpo", *sys.argv[1:]])
    about: dict[str, Any] = {}
    if subject is not None:
        about = {"model": asdict(subject), "names": model_cases.LEVELS}
    content = build(target, rows, levels=levels, quick=args.quick, known=known, command=command, **about)
    if args.sign:
        content["signature"] = sign(content, args.sign)
    if args.json:
        write(args.json, content)
    if args.html:
        args.html.write_text(page(content), encoding="utf-8")
    print()
    print_table(
        ["level", "", "verdict", "cases"],
        [
            [str(row["level"]), row["name"], row["verdict"], _counted(row["counts"])]
            for row in content["levels"]
        ],
    )
    if content["target"]["limits"]:
        print("\nsimulated: nothing of this was measured on hardware")
        for limit in content["target"]["limits"]:
            print(f"- {limit}")
    for row in known:
        if row["state"] in STALE:
            print(advice(row))
    print(f"\n{subject.family if subject else target.device.name}: {content['verdict']}")
    return 1 if content["verdict"] == "fail" else 0


def _whole(target: Any, subject: Any) -> Sequence[Any]:
    """Every case that there is, whichever of them this run asks."""
    from . import collect, model_cases

    if subject is None:
        return collect.collect(target, levels=collect.pick_levels([]), quick=False)
    name = subject.folder or subject.family
    return model_cases.cases(name, target.catalogue, levels=model_cases.pick_levels([]), quick=False)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
