"""`grpo conformance -n`: outcomes of several processes in one report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_report_of_several_processes_has_their_cases(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    ids = {}
    for workers in ("", "2"):
        out = tmp_path / f"report{workers}.json"
        words = ["conformance", "cpu", "--level", "ops", "--quick", "-k", "mlp.swiglu and float32"]
        more = ["-n", workers] if workers else []
        done = subprocess.run(
            [sys.executable, "-m", "grpo_core.cli.main", *words, *more, "--json", str(out)],
            cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads(out.read_text(encoding="utf-8"))
        assert report["verdict"] == "pass"
        ids[workers] = [case["id"] for case in report["cases"]]
    assert ids["2"] == ids[""] != []
