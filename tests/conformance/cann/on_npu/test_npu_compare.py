"""One configuration on the CPU, the simulated accelerator and the simulated NPU, in one report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_core.cli.main import main
from grpo_core.report.read import read_runs

DEVICES = ("cpu", "sim", "ascend")


def test_the_same_config_on_three_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["compare", "--devices", ",".join(DEVICES), "--twins", "1", "-o", str(out)]
    assert main(words) == 0, capsys.readouterr()
    assert capsys.readouterr().out.count("within the band") == 2
    runs = read_runs([out / name for name in DEVICES])
    assert [run.plan["device"]["type"] for run in runs] == ["cpu", "sim", "npu"]
    assert "simulated" in runs[2].plan["device"]["features"]
    chosen = {row["op"]: row["chosen"] for row in runs[2].plan["choices"]}
    # In float32 the vendor's kernels train, and plain torch over the same pages decodes.
    for op in ("attention.shared_prefix", "norm.rms", "rope.apply", "mlp.swiglu", "optim.adamw"):
        assert chosen[op] == "ascend:npu"
    assert chosen["attention.decode"] == "ascend:torch"
    assert "torch-npu" in json.loads((out / "ascend" / "environment.json").read_text())["packages"]
    page = (out / "report.html").read_text()
    assert page.count('class="verdict good"') == 2
    for text in ("cpu, sim and ascend", "Ascend NPU, simulated CANN", "ascend:npu", "Distance from cpu"):
        assert text in page
