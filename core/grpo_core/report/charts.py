"""Which plots a report shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .read import RunData
from .svg import Series, line_chart, stacked_bars
from .text import text

PHASES = ("rollout", "reward", "logprob", "train", "sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A chart over metrics of all runs."""

    title: str
    names: tuple[tuple[str, str], ...]
    """(metric, what its curve is called); the second and later ones are dashed."""
    note: str = ""
    zero: bool = False
    percent: bool = False
    spread: str = ""
    """Metric with the standard deviation drawn as a band around the first curve."""


PLOTS = (
    Plot(
        title="Reward", names=(("reward/mean", "mean"),), spread="reward/std",
        note="mean of a step, one standard deviation around it",
    ),
    Plot(title="Loss", names=(("policy/total_loss", "loss"),), note="of the optimizer's steps, mean"),
    Plot(title="Completion length", names=(("length/mean", "mean"),), note="tokens", zero=True),
    Plot(
        title="Cut at the token limit", names=(("length/clipped", "cut"),), percent=True, zero=True,
        note="share of completions",
    ),
    Plot(title="Entropy", names=(("policy/entropy", "entropy"),), note="nats per token", zero=True),
    Plot(
        title="Clip fraction", names=(("policy/clip_fraction", "clipped"),), percent=True, zero=True,
        note="share of tokens",
    ),
    Plot(
        title="Gradient norm", names=(("policy/grad_norm", "norm"),), note="before clipping", zero=True,
    ),
    Plot(
        title="Rollout-trainer log-prob gap", names=(("mismatch/logprob_gap_mean", "mean"),),
        note="absolute difference per token, mean", zero=True,
    ),
    Plot(
        title="Largest log-prob gap", names=(("mismatch/logprob_gap_max", "largest"),),
        note="absolute difference of the worst token", zero=True,
    ),
    Plot(title="KL to the reference", names=(("policy/kl", "KL"),), note="nats per token", zero=True),
    Plot(title="KL to the old policy", names=(("policy/approx_kl", "KL"),), note="nats per token", zero=True),
    Plot(
        title="Groups without a signal", names=(("reward/zero_std_groups", "groups"),), percent=True,
        note="share of groups whose rewards are all equal", zero=True,
    ),
    Plot(
        title="Throughput", zero=True, note="tokens per second",
        names=(("throughput/rollout_tokens_per_s", "rollout"), ("throughput/train_tokens_per_s", "train")),
    ),
    Plot(title="Memory", names=(("memory/peak_gb", "peak"),), note="peak of the step, GB", zero=True),
)  # fmt: skip


def charts(runs: Sequence[RunData]) -> Iterator[str]:
    """HTML of each chart that has data."""
    for number, plot in enumerate(with_evaluations(runs)):
        series = list(_series(plot, runs))
        if series:
            chart = line_chart(plot.title, series, zero=plot.zero, percent=plot.percent)
            yield _figure(plot.title, plot.note, chart, _legend(plot, runs), wide=number == 0)
    for number, run in enumerate(runs):
        found = _time_split(run)
        if found:
            title = "Time split" if len(runs) == 1 else f"Time split of {run.label}"
            keys = "".join(
                f'<span class="key p{i}"><i></i>{name}</span>' for i, name in enumerate((*PHASES, "other"))
            )
            yield _figure(title, "seconds of a step", found, keys, wide=False, style=f"c{number}")


def with_evaluations(runs: Sequence[RunData]) -> list[Plot]:
    """The plots, with the evaluations and the single rewards that these runs have after the reward."""
    names = list(dict.fromkeys(name for run in runs for name in run.names()))
    evaluations = [name for name in names if name.startswith("eval/") and name.endswith("/reward")]
    parts = [name for name in names if name.startswith("reward/") and name[7:].endswith("/mean")]
    extra = [
        Plot(title=f"Evaluation: {name[5:-7]}", names=((name, "reward"),), note="mean reward")
        for name in evaluations
    ]
    if len(parts) > 1:
        extra += [
            Plot(title=f"Reward: {name[7:-5]}", names=((name, "mean"),), note="unweighted") for name in parts
        ]
    return [PLOTS[0], *extra, *PLOTS[1:]]


def _series(plot: Plot, runs: Sequence[RunData]) -> Iterator[Series]:
    for run_number, run in enumerate(runs):
        for name_number, (name, called) in enumerate(plot.names):
            points = run.points(name)
            if any(value is not None for _, value in points):
                yield Series(
                    label=called if len(runs) == 1 else f"{run.label}, {called}",
                    style=f"c{run_number % 6}",
                    points=points,
                    band=_spread(run, name, plot.spread) if name_number == 0 else (),
                    dashed=name_number > 0,
                    under=run_number == 0 and len(runs) > 1 and name_number == 0,
                )


def _spread(run: RunData, name: str, spread: str) -> list[tuple[float, float, float]]:
    width = dict(run.points(spread)) if spread else {}
    band = []
    for x, y in run.points(name):
        half = width.get(x)
        if y is not None and half is not None:
            band.append((x, y - half, y + half))
    return band


def _legend(plot: Plot, runs: Sequence[RunData]) -> str:
    present = [called for name, called in plot.names if any(run.points(name) for run in runs)]
    keys = []
    if len(runs) > 1:
        keys += [
            f'<span class="key c{number % 6}"><i></i>{text(run.label)}</span>'
            for number, run in enumerate(runs)
        ]
    if len(present) > 1:
        plain = "key" if len(runs) > 1 else "key c0"
        keys += [
            f'<span class="{plain} {"dash" if number else "solid"}"><i></i>{text(called)}</span>'
            for number, called in enumerate(present)
        ]
    return "".join(keys)


def _time_split(run: RunData) -> str:
    rows = [row for row in run.rows if isinstance(row.get("time/step"), int | float) and row["time/step"] > 0]
    if not rows:
        return ""
    layers = []
    for number, phase in enumerate(PHASES):
        layers.append((phase, f"p{number}", [float(row.get(f"time/{phase}") or 0.0) for row in rows]))
    known = [sum(values) for values in zip(*(layer[2] for layer in layers), strict=True)]
    other = [max(0.0, float(row["time/step"]) - total) for row, total in zip(rows, known, strict=True)]
    layers.append(("other", f"p{len(PHASES)}", other))
    return stacked_bars(f"Time split of {run.label}", [float(row["step"]) for row in rows], layers)


def _figure(title: str, note: str, chart: str, keys: str, *, wide: bool, style: str = "") -> str:
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    return (
        f'<figure class="chart{" wide" if wide else ""} {style}"><figcaption><b>{text(title)}</b>'
        f"<span>{text(note)}</span></figcaption>{legend}{chart}</figure>"
    )
