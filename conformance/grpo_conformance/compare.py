"""`grpo compare`: train one configuration on several devices and lay the runs over each other.

Each device runs in a process of its own, because torch takes one foreign device type a process.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_core.cli.table import print_table
from grpo_core.errors import ConfigError

if TYPE_CHECKING:
    from grpo_core.planning import PlannedRun

TRAIN = (sys.executable, "-m", "grpo_core.cli.main")
"""The command line of grpo, in this installation."""
TAIL = 12
"""Last lines of a run's output that are shown when it fails."""
TINY_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training run to do."""

    label: str
    device: str
    overrides: tuple[str, ...]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo compare`."""
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG key=value",
        help="YAML file and settings; without a file a tiny task that the suite brings",
    )  # fmt: skip
    parser.add_argument(
        "--devices", required=True, help="names with commas; the others are held against the first"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="for runs and report")
    parser.add_argument(
        "--twins", type=int, default=2, metavar="N",
        help="runs of the first device from weights changed by a rounding, which give the band (2)",
    )  # fmt: skip
    parser.add_argument(
        "--kind",
        default="dense",
        help="of the tiny model: dense, gated_delta or mla",
    )
    parser.add_argument(
        "--by", action="append", default=[], metavar="DEVICE=COMMAND",
        help="what runs grpo for a device, instead of this Python: a simulator, another environment",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when every device stays within the band, 1 when one does not."""
    devices = list(dict.fromkeys(name for name in args.devices.split(",") if name))
    commands = commands_of(args.by, devices)
    if len(devices) < 2 or args.twins < 0:
        raise ConfigError(
            "grpo compare takes two devices or more",
            why=f"--devices names {len(devices)}" if len(devices) < 2 else f"--twins is {args.twins}",
            fix="say for instance --devices cpu,sim",
        )
    args.out.mkdir(parents=True, exist_ok=True)
    words = args.words if args.words and "=" not in args.words[0] else [_tiny(args), *args.words]
    jobs = jobs_of(words, devices, args.out, args.twins)
    for job in jobs:
        train(job, words, commands.get(job.device, TRAIN), args.out)
    return judge(jobs[: len(devices)], jobs[len(devices) :], args.out)


def commands_of(given: Sequence[str], devices: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """What runs grpo for some of the devices. Raises `ConfigError` for a device that is not compared."""
    found = {}
    for text in given:
        device, _, command = text.partition("=")
        if device not in devices or not command:
            raise ConfigError(
                f"--by {text!r} says not how to run one of the devices",
                why=f"devices: {', '.join(devices)}",
                fix='write --by DEVICE="COMMAND"; the arguments of grpo are put behind it',
            )
        found[device] = tuple(shlex.split(command))
    return found


def jobs_of(words: Sequence[str], devices: Sequence[str], out: Path, twins: int) -> list[Job]:
    """The runs, one for each device, then the twins of the first.

    Raises `ConfigError` for folders that exist, and the `GrpoError` of a plan that the first device cannot
    make.
    """
    from grpo_core.config_loader import load_config
    from grpo_core.planning import plan_run

    planned = plan_run(load_config(Path(words[0]), [*words[1:], f"device={devices[0]}"]))
    config = planned.config
    same = (
        # On all devices, whatever each finds fast; and every completion, to see where runs part.
        f"train.dtype={planned.facts.train_dtype}",
        f"run.log_samples={config.rollout.prompts * config.algo.group_size}",
        "run.save_every=0",
    )
    labels = [*devices, *(f"twin-{number}" for number in range(1, twins + 1))]
    for label in labels:
        _check_free(out / label)
    models = [_jolted(planned, out / "models" / label, seed) for seed, label in _twins(labels, devices)]
    jobs = [Job(label=name, device=name, overrides=same) for name in devices]
    jobs += [
        Job(label=label, device=devices[0], overrides=(*same, f"model={model}"))
        for (_, label), model in zip(_twins(labels, devices), models, strict=True)
    ]
    return jobs


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise ConfigError(
            f"{folder} exists",
            why="a run never writes into the folder of another",
            fix="give another folder with -o",
        )


def _twins(labels: Sequence[str], devices: Sequence[str]) -> list[tuple[int, str]]:
    return list(enumerate(labels[len(devices) :], start=1))


def _jolted(planned: PlannedRun, folder: Path, seed: int) -> Path:
    """A copy of the model whose weights are each off by a rounding of the compute dtype."""
    from .system.bands import ROUNDING
    from .system.models import jolt

    folder.mkdir(parents=True)
    return jolt(planned.model_path, folder, ROUNDING[planned.facts.train_dtype], seed=seed)


def _tiny(args: argparse.Namespace) -> str:
    """A configuration with model and data of the suite's own, in the folder of the comparison."""
    from grpo_core.plugins import load

    from .system.models import KINDS, served, write_model
    from .system.task import settings, write_data
    from .system.trajectory import SETTINGS

    if args.kind not in KINDS:
        raise ConfigError(
            f"there is no tiny model of the kind {args.kind!r}",
            why=f"kinds: {', '.join(KINDS)}",
            fix="choose one of them, or give a configuration of your own",
        )
    found = served(KINDS[args.kind], load())
    if isinstance(found, str):
        raise ConfigError(
            f"no installed family serves {args.kind}", why=found, fix="install one, or give a configuration"
        )
    family, config = found
    folder = args.out / "models" / "tiny"
    _check_free(folder)
    folder.mkdir(parents=True)
    write_model(folder, family, config, seed=20)
    data = write_data(args.out / "data.jsonl")
    tree = settings(folder, data, "cpu", **SETTINGS, train__steps=TINY_STEPS)
    file = args.out / "config.yaml"
    file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return str(file)


def train(job: Job, words: Sequence[str], command: Sequence[str], out: Path) -> None:
    """One run. Raises `ConfigError` with the end of its output when it fails."""
    own = (f"device={job.device}", f"run.dir={out / job.label}", f"run.name={job.label}")
    log = out / f"{job.label}.log"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        line = [*command, "train", *words, *job.overrides, *own]
        code = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        raise ConfigError(
            f"the run on {job.device} ended with code {code}",
            why="\n".join(said) or "it said nothing",
            fix=f"all that it said is in {log}",
        )
    print(f"{job.label}: {time.monotonic() - started:.0f} s", flush=True)


def judge(jobs: Sequence[Job], twins: Sequence[Job], out: Path) -> int:
    """Write the report, print the verdicts; 1 where one is bad."""
    from grpo_core.report.compared import verdict
    from grpo_core.report.differences import compare
    from grpo_core.report.html import write_report
    from grpo_core.report.read import read_runs

    folders, beside = [out / job.label for job in jobs], [out / job.label for job in twins]
    found = compare(read_runs(folders), read_runs(beside))
    print_table(["device", f"beside {jobs[0].label}"], [[one.run.label, verdict(one)] for one in found])
    print(f"report: {write_report(folders, out / 'report.html', twins=beside)}")
    return 1 if any(one.problem for one in found) else 0
