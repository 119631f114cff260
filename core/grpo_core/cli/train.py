"""`grpo train run.yaml [key=value ...]`, and `grpo train --resume run/`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import latest_checkpoint, read_state
from ..config import Config
from ..config_loader import dump_yaml, load_config
from ..errors import ConfigError
from ..plan import Plan, load_plan
from ..planning import PlannedRun, plan_run
from ..rundir import (
    CONFIG,
    PLAN,
    choose_run_dir,
    drop_after,
    make_run_dir,
    open_run_dir,
    write_environment,
)

if TYPE_CHECKING:
    from ..loop import Parts


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo train`."""
    parser.add_argument("config", nargs="?", help="YAML file, or the first key=value when resuming")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the run in this folder bit for bit"
    )
    parser.add_argument(
        "--plan", type=Path, metavar="PLAN.JSON", help="pin every op to an earlier plan's choice"
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns 0 when all steps are done."""
    if args.resume is not None:
        return resume(args.resume, [args.config, *args.overrides] if args.config else args.overrides)
    if args.config is None:
        raise ConfigError(
            "no configuration was given",
            why="`grpo train` needs a YAML file",
            fix="try `grpo train recipes/quickstart.yaml`, or `grpo train --resume run/`",
        )
    loaded = load_config(Path(args.config), args.overrides)
    planned = plan_run(loaded, earlier=load_plan(args.plan) if args.plan else None)
    run_dir = choose_run_dir(planned.config.run.dir, planned.config.run.name)
    parts = build(planned, resume_from=None)
    make_run_dir(run_dir)
    (run_dir / CONFIG).write_text(dump_yaml(pinned_dir(planned.config, run_dir)))
    planned.plan.save(run_dir / PLAN)
    write_environment(run_dir, planned.packages())
    return train(planned, parts, run_dir, first_step=0)


def resume(run_dir: Path, overrides: list[str]) -> int:
    """Continue from the newest whole checkpoint of a run folder, or from its start when it has none."""
    open_run_dir(run_dir)
    earlier: Plan = load_plan(run_dir / PLAN)
    planned = plan_run(load_config(run_dir / CONFIG, overrides), earlier=earlier)
    checkpoint = latest_checkpoint(run_dir)
    first_step = read_state(checkpoint).step if checkpoint else 0
    parts = build(planned, resume_from=checkpoint)
    drop_after(run_dir, first_step if checkpoint else -1)
    return train(planned, parts, run_dir, first_step=first_step)


def pinned_dir(config: Config, run_dir: Path) -> Config:
    """The settings with the folder that the run really got."""
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})


def build(planned: PlannedRun, *, resume_from: Path | None) -> Parts:
    """Everything that the loop needs; fails before anything is written."""
    from ..session import build_parts

    for warning in (*planned.loaded.warnings, *planned.catalogue.failures):
        print(f"warning: {warning}", file=sys.stderr)
    for note in planned.plan.notes:
        print(f"note: {note}", file=sys.stderr)
    return build_parts(planned, resume_from=resume_from)


def train(planned: PlannedRun, parts: Parts, run_dir: Path, *, first_step: int) -> int:
    """Run the loop, then write the report."""
    from .. import loop
    from ..progress import make_progress
    from ..report.html import write_report
    from ..session import RunWriter
    from ..trackers import open_trackers

    config = planned.config
    trackers = open_trackers(config, run_dir, planned.catalogue.registry, first_step=first_step)
    try:
        with make_progress(config.train.steps, first_step=first_step) as progress:
            progress.note(
                f"{config.model} on {planned.info.name or planned.device.name}, plan {planned.plan.id},"
                f" {planned.facts.train_dtype}; run folder {run_dir}"
            )
            writer = RunWriter(
                planned=planned, parts=parts, run_dir=run_dir, trackers=trackers, progress=progress
            )
            loop.train(parts, writer, first_step=first_step)
    finally:
        for tracker in trackers:
            tracker.close()
        close(parts)
    report = write_report([run_dir], run_dir / "report.html")
    print(f"report: {report}\ncheckpoint: {latest_checkpoint(run_dir)}")
    return 0


def close(parts: Parts) -> None:
    """End worker processes and free the engines."""
    parts.rewards.close()
    parts.rollout.close()
    parts.trainer.close()
