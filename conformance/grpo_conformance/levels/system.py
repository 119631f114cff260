"""Level 5: whole runs. Rollout and trainer agree, weights arrive, sleep and checkpoints lose nothing, replay
replays, and a short run goes the way of the references' run on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..case import Case, Target

PACKAGE = "grpo_conformance.system"
DTYPES = ("float32", "bfloat16")
KINDS = ("dense", "gated_delta", "mla")
"""Of models: GQA attention; gated delta with softmax experts; MLA with sigmoid experts in groups."""
DENSE = "dense"
STEPS, QUICK_STEPS = 10, 5
"""Of a trajectory."""
SECONDS = 240.0
"""A case takes some seconds of an idle host; a device may compile its kernels in the first one."""


def cases(target: Target, *, quick: bool) -> Iterable[Case]:
    """The same questions for each kind of model, in each dtype that the device declares.

    A kind that nothing on the device serves, and `consistent` and device graphs where the offers do not
    declare them, are told when the plan is made, as not declared. `quick` asks all questions in one dtype,
    agreement in both, of the dense kind alone; of MLA those that it could answer otherwise, and nothing of
    gated delta.
    """
    dtypes = [dtype for dtype in DTYPES if dtype in target.probe.info.dtypes]
    chosen = dtypes[:1] if quick else dtypes
    for kind in (kind for kind in KINDS if not (quick and kind == "gated_delta")):
        whole = kind == DENSE or not quick
        for dtype in dtypes:
            yield _case(kind, "agreement", "agreement", dtype=dtype)
        for dtype in chosen:
            yield _case(kind, "agreement", "consistent", dtype=dtype)
            yield _case(kind, "sync", "sync", dtype=dtype)
            yield _case(kind, "graphs", "graphs", dtype=dtype)
        if whole:
            yield from _endurance(kind, chosen, quick=quick)
        if kind != DENSE:
            yield from _replays(kind, chosen)
        if whole and "float32" in dtypes:
            yield _case(kind, "trajectory", "trajectory", steps=QUICK_STEPS if quick else STEPS)


def _endurance(kind: str, dtypes: list[str], *, quick: bool) -> Iterator[Case]:
    for dtype in dtypes:
        for keep in ("host",) if quick or kind != DENSE else ("host", "disk"):
            yield _case(kind, "sleep", "sleep", dtype=dtype, keep=keep)
        yield _case(kind, "resume", "resume", dtype=dtype)


def _replays(kind: str, dtypes: list[str]) -> Iterator[Case]:
    for dtype in dtypes:
        yield _case(kind, "replay", "replay", dtype=dtype)
        yield _case(kind, "replay", "old_pass", dtype=dtype)
    if "float32" in dtypes:
        yield _case(kind, "replay", "forced")


def _case(kind: str, module: str, function: str, **args: str | int) -> Case:
    words = "/".join([function, *(str(value) for value in args.values())])
    return Case(
        id=f"system/{kind}/{words}", level=5, subject=f"system {kind}", timeout=SECONDS,
        run=f"{PACKAGE}.{module}:{function}", args={"kind": kind, **args},
    )  # fmt: skip
