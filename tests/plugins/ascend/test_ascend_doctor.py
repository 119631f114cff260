"""What `grpo doctor --device ascend` finds on hosts made of files, and what its rows claim."""

from __future__ import annotations

import json
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from grpo_ascend import doctor, host
from grpo_ascend.offers import TORCH_NPU
from grpo_ascend.rows import rows
from grpo_core.devices.doctor import Check

ROOT = Path(__file__).parents[3]
SURFACE = json.loads(files("grpo_ascend").joinpath("vendor_surface.json").read_text(encoding="utf-8"))


def by_part(found: list[Check]) -> dict[str, Check]:
    return {check.part: check for check in found}


class Host:
    """An Ascend host in a folder."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.environment = place, {"PATH": str(place / "bin")}
        self.versions: dict[str, str] = {}
        monkeypatch.setattr(host, "NODES", str(place / "davinci[0-9]*"))
        monkeypatch.setattr(host, "MANAGERS", (str(place / "davinci_manager"),))
        monkeypatch.setattr(host, "DRIVER", place / "driver.info")
        monkeypatch.setattr(host, "TOOLKITS", (str(place / "cann"),))
        monkeypatch.setattr(doctor, "CARD_NETWORK", place / "hccn.conf")
        monkeypatch.setattr(host, "installed_version", self.versions.get)
        monkeypatch.setattr(doctor, "installed_version", self.versions.get)

    def write(self, name: str, text: str = "") -> Path:
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def chips(self, count: int = 8) -> None:
        for index in range(count):
            self.write(f"davinci{index}")
        self.write("davinci_manager")
        self.write("driver.info", "Version=25.0.rc1.1\nascendhal_version=7.35\n")

    def cann(self, toolkit: str = "9.1.0", ops: str = "9.1.0") -> None:
        folder = "cann/aarch64-linux"
        self.write(f"{folder}/ascend_toolkit_install.info", f"package_name=toolkit\nversion={toolkit}\n")
        if ops:
            self.write(f"{folder}/ascend_ops_install.info", f"version={ops}\n")
        self.environment["ASCEND_HOME_PATH"] = str(self.place / "cann")

    def found(self) -> dict[str, Check]:
        return by_part(list(doctor.checks(self.environment)))


@pytest.fixture
def ascend_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_a_laptop_lacks_three_things_each_with_its_fix(ascend_host: Host) -> None:
    found = ascend_host.found()
    missing = [part for part, check in found.items() if check.status == "missing"]
    assert missing == ["driver", "CANN", "torch-npu"]
    assert all(found[part].fix for part in missing)
    assert found["tested row"].status == "unknown"
    # All that the page promises is looked at, whether it is there or not.
    assert {"vllm-ascend", "MindSpeed", "jemalloc", "network", "open files", "shared memory"} <= set(found)


def test_driver_and_cann_of_a_full_host(ascend_host: Host) -> None:
    ascend_host.chips()
    ascend_host.cann()
    ascend_host.write("hccn.conf")
    ascend_host.write("bin/npu-smi").chmod(0o755)
    ascend_host.environment["ATB_HOME_PATH"] = "/nnal/atb"
    found = ascend_host.found()
    assert found["driver"].why == "8 chip(s), driver 25.0.rc1.1, 8 visible"
    assert found["CANN"].why.startswith("9.1.0, in ") and found["CANN ops"].why == "9.1.0"
    assert "npu-smi" not in found and found["NNAL"].status == found["chips' network"].status == "ok"


def test_a_container_without_the_managers_and_the_driver(ascend_host: Host) -> None:
    ascend_host.write("davinci0")
    found = list(doctor.checks(ascend_host.environment))
    drivers = [check for check in found if check.part == "driver"]
    assert [check.status for check in drivers] == ["missing", "missing"]
    assert "--device=" in drivers[0].fix and "mount the driver" in drivers[1].fix


def test_cann_that_does_not_fit_itself(ascend_host: Host) -> None:
    ascend_host.cann(toolkit="9.1.0", ops="8.5.0")
    assert ascend_host.found()["CANN ops"].status == "wrong"
    (ascend_host.place / "cann/aarch64-linux/ascend_ops_install.info").unlink()
    assert ascend_host.found()["CANN ops"].status == "advice"
    ascend_host.write("cann/opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b/x.o")
    assert ascend_host.found()["CANN ops"].why == "ascend910b"


def test_cann_that_is_installed_but_not_sourced(ascend_host: Host) -> None:
    ascend_host.cann()
    del ascend_host.environment["ASCEND_HOME_PATH"]
    said = ascend_host.found()["CANN"]
    assert said.status == "missing" and said.fix == f"source {ascend_host.place}/cann/set_env.sh"


def test_chips_that_a_variable_hides(ascend_host: Host) -> None:
    ascend_host.chips(2)
    ascend_host.environment["ASCEND_RT_VISIBLE_DEVICES"] = ""
    said = ascend_host.found()["driver"]
    assert said.status == "wrong" and "hides them all" in said.why


def test_versions_are_told_from_the_nearest_row(ascend_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host.importlib.util, "find_spec", lambda name: object() if name == "torch_npu" else None
    )
    monkeypatch.setattr(doctor, "_package", lambda environment: iter(()))
    ascend_host.cann()
    ascend_host.versions.update({"torch": "2.10.0+cpu", "torch-npu": "2.10.0.post4"})
    said = ascend_host.found()["tested row"]
    assert said.status == "ok" and said.why.startswith("torch-2.10 (")
    ascend_host.versions["torch-npu"] = "2.10.0.post7"
    said = ascend_host.found()["tested row"]
    assert said.status == "advice" and "torch-npu 2.10.0.post4 (2.10.0.post7 is here)" in said.why
    assert said.fix.endswith("--row torch-2.10")


def test_vllm_and_its_backend_go_together(ascend_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch==2.10.0", "numpy"])
    monkeypatch.setattr(
        doctor, "unmet", lambda item: "needs torch==2.10.0, 2.9.0 is installed" if "2.10" in item else None
    )
    assert "grpo's own engine" in doctor._vllm_ascend().why
    ascend_host.versions["vllm-ascend"] = "0.23.0.post1"
    assert "no vllm" in doctor._vllm_ascend().why
    ascend_host.versions["vllm"] = "0.22.0"
    said = doctor._vllm_ascend()
    assert "vllm 0.22.0" in said.why and said.fix.endswith("vllm==0.23.0")
    ascend_host.versions["vllm"] = "0.23.0"
    assert "needs torch==2.10.0, 2.9.0 is installed" in doctor._vllm_ascend().why
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: None)
    assert doctor._vllm_ascend().status == "ok"


def test_the_placeholder_called_mindspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._mindspeed().why.startswith("not installed")
    (tmp_path / "mindspeed").mkdir()
    (tmp_path / "mindspeed" / "__init__.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    said = doctor._mindspeed()
    assert said.status == "advice" and said.fix.startswith("pip uninstall mindspeed")
    (tmp_path / "mindspeed" / "megatron_adaptor.py").touch()
    assert doctor._mindspeed().status == "ok" and "mindspeed" not in sys.modules


def test_jemalloc_is_preloaded_from_a_file_that_is_there(tmp_path: Path) -> None:
    library = tmp_path / "libjemalloc.so.2"
    said = doctor._jemalloc({"LD_PRELOAD": f"/other.so {library}"})
    assert said.status == "advice" and "which is not here" in said.why
    library.touch()
    assert doctor._jemalloc({"LD_PRELOAD": f"/other.so:{library}"}).status == "ok"
    assert "export LD_PRELOAD=" in doctor._jemalloc({}).fix


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"PYTORCH_NPU_ALLOC_CONF": "a", "PYTORCH_ALLOC_CONF": "b"}, "wrong"),
        ({"PYTORCH_NPU_ALLOC_CONF": "a"}, ""),
        ({"INF_NAN_MODE_ENABLE": "0"}, "wrong"),
        ({"INF_NAN_MODE_ENABLE": "1"}, ""),
        ({"ASCEND_LAUNCH_BLOCKING": "1"}, "advice"),
        ({"TASK_QUEUE_ENABLE": "2"}, "advice"),
    ],
)
def test_variables_that_spoil_a_run(settings: dict[str, str], status: str) -> None:
    found = list(doctor._settings(settings))
    assert [check.status for check in found] == ([status] if status else [])


def test_an_audited_row_is_in_the_audits_surface_and_admitted_by_the_offers() -> None:
    [admitted] = map(Requirement, TORCH_NPU)
    [surface] = [one for one in SURFACE["packages"] if one["distribution"] == "torch-npu"]
    for row in rows():
        version = row.versions["torch-npu"]
        assert row.proof and version in surface["archives"], row.name
        assert admitted.specifier.contains(version), row.name


def test_a_simulated_row_has_a_report_of_its_version() -> None:
    report = ROOT / "conformance" / "reports" / "ascend-simulated.json"
    text = report.read_text(encoding="utf-8") if report.exists() else ""
    for row in rows():
        assert row.proof != "hardware", "no report from hardware is committed"
        if row.proof == "simulated":
            assert re.search(rf"torch[-_]npu\W+{re.escape(row.versions['torch-npu'])}\"", text), row.name


def test_constraints_say_what_the_rows_say() -> None:
    names = set()
    for row in rows():
        package, _, rest = row.constraints.partition("/")
        text = files(package).joinpath(rest).read_text(encoding="utf-8")
        pins = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
        for name in ("torch", "torch-npu", "vllm", "vllm-ascend", "triton-ascend"):
            assert pins.get(name) == row.versions.get(name), (row.name, name)
        names.add(rest.removeprefix("constraints/"))
    assert names == {path.name for path in files("grpo_ascend").joinpath("constraints").iterdir()}


def test_no_row_asks_pypi_for_mindspeed() -> None:
    for row in rows():
        for step in row.steps:
            assert not re.search(r"pip install\b.* mindspeed", step.command), step.command
            assert "apex" not in step.command
