"""GRPO from end to end over the CUDA plugin's torch attention and pages, on the host, beside the CPU's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_helpers import offering

from grpo_core import planning
from grpo_core.cli.main import main
from grpo_core.plugins import load
from grpo_cuda.offers_attention import OFFERS

BAND = 1e-3
"""Relative to max(1, the other's value). Both compute in float32 and differ by about 1e-7 a step, which
AdamW's division by small second moments can raise a thousandfold in four steps."""

OPS = {f"attention.{name}" for name in ("varlen", "shared_prefix", "cache", "prefill", "decode")}


def run(recipe: Path, folder: Path) -> list[dict[str, Any]]:
    assert main(["train", str(recipe), f"run.dir={folder}"]) == 0
    plan = json.loads((folder / "plan.json").read_text())
    served = {row["op"]: row["chosen"] for row in plan["choices"]}
    ours = {op for op, chosen in served.items() if str(chosen).startswith("hosted:")}
    assert ours == (OPS if folder.name != "cpu" else set())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cache", ["paged", "small_pages"])
def test_a_run_on_the_host(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    impls = [
        replace(
            impl,
            device="cpu",
            graph=False,
            when=None,
            rank=99,
            limits={**impl.limits, **({"cache": {f"hosted:{cache}"}} if "cache" in impl.limits else {})},
        )
        for impl in OFFERS
        if impl.name in ("sdpa", "paged", cache) and (impl.op != "attention.cache" or impl.name == cache)
    ]
    wanted = run(tiny_recipe, tmp_path / "cpu")
    monkeypatch.setattr(planning, "load", lambda off=(): load(off=off, extra={"hosted": offering(*impls)}))
    got = run(tiny_recipe, tmp_path / cache)
    assert len(got) == len(wanted) == 4
    for step, (ours, theirs) in enumerate(zip(got, wanted, strict=True), 1):
        for name, value in theirs.items():
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert abs(ours[name] - value) <= BAND * max(1.0, abs(value)), (step, name)
    assert got[0]["policy/grad_norm"] > 0
