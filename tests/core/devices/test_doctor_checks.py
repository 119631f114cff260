"""Checks of a host that every maker of chips shares, and versions held against tested rows."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo_core.devices import doctor, host
from grpo_core.devices.doctor import Check, Row, checks_of, pick_row, row_check, rows_of
from grpo_core.errors import ConfigError


def row(name: str, **versions: str) -> Row:
    spelled = {key.replace("_", "-"): value for key, value in versions.items()}
    return Row(name=name, versions=spelled, proof="audited", basis="", constraints="", steps=())


ROWS = (row("new", torch="2.10.0", acme_rt="9.1"), row("old", torch="2.7.1", acme_rt="9.1"))


def test_a_finding_without_a_fix_is_no_finding() -> None:
    with pytest.raises(ValueError, match="driver is missing and has no fix"):
        Check(part="driver", status="missing", why="not here")
    with pytest.raises(ValueError, match="status must be one of ok, missing"):
        Check(part="driver", status="gone", why="not here", fix="find it")
    assert Check(part="driver", status="unknown", why="who knows").fix == ""


def test_installed_versions_are_a_row_or_are_told_the_nearest() -> None:
    said = row_check(ROWS, {"torch": "2.7.1+cpu", "acme-rt": "9.1", "numpy": "1.0"}, "acme")
    assert (said.status, said.why) == ("ok", "old (audited): ")
    said = row_check(ROWS, {"torch": "2.7.1", "acme-rt": "9.0"}, "acme")
    assert said.status == "advice" and "old, has acme-rt 9.1 (9.0 is here)" in said.why
    assert said.fix == "grpo doctor --device acme --install-plan --row old"
    assert row_check(ROWS, {"numpy": "1.0"}, "acme").status == "unknown"
    assert row_check((), {"torch": "2.7.1"}, "acme").status == "unknown"
    # One version that agrees says nothing about the others.
    assert row_check(ROWS, {"torch": "2.6.0"}, "acme").status == "advice"


def test_a_row_is_found_by_name_and_the_first_is_the_default() -> None:
    assert pick_row(ROWS, "", "acme").name == "new" and pick_row(ROWS, "old", "acme").name == "old"
    with pytest.raises(ConfigError, match="no row 'odl'") as error:
        pick_row(ROWS, "odl", "acme")
    assert "did you mean 'old'" in error.value.what and "new, old" in error.value.why
    with pytest.raises(ConfigError, match="has no tested rows"):
        pick_row((), "", "acme")


def test_a_doctor_that_fails_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("acme_doctor")
    module.checks = lambda: 1 // 0
    module.rows = lambda: 1 // 0
    monkeypatch.setitem(sys.modules, "acme_doctor", module)
    for name in ("acme_doctor", "acme_doctor_absent"):
        device: Any = SimpleNamespace(name="acme", doctor=name)
        [said] = checks_of(device)
        assert said.status == "wrong" and "'acme'" in said.why and rows_of(device) == ()
    assert checks_of(SimpleNamespace(name="plain")) == ()  # type: ignore[arg-type]


def test_the_system_is_one_that_there_are_wheels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    now = sys.version_info[:2]
    assert host.system_check(("aarch64",), ((3, 11), now)).status == "ok"
    said = host.system_check(("aarch64",), ((3, 8), (3, 9)))
    assert said.status == "wrong" and said.fix == "make the environment with Python 3.9"
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    said = host.system_check(("x86_64", "aarch64"), ((3, 11), now))
    assert said.status == "missing" and "Linux on x86_64 and aarch64" in said.why


def interfaces(place: Path, **states: str) -> Path:
    for name, state in states.items():
        (place / name).mkdir()
        (place / name / "operstate").write_text(f"{state}\n")
    return place


@pytest.mark.parametrize(
    ("value", "status"),
    [("", "advice"), ("eth", "ok"), ("=eth0", "ok"), ("=eth", "wrong"), ("eth1", "wrong"), ("^docker", "ok"),
     ("^=eth0,=ib0", "ok"), ("^=eth,ib,lo", "ok"), ("^eth,ib,lo", "wrong"), ("wlan,ib", "ok"), ("lo", "ok")],
)  # fmt: skip
def test_the_interface_that_a_variable_names(tmp_path: Path, value: str, status: str) -> None:
    folder = interfaces(tmp_path, lo="unknown", eth0="up", eth1="down", ib0="up")
    said = host.network("ACME_IFNAME", {"ACME_IFNAME": value}, folder)
    assert said.status == status and "up: eth0, ib0" in said.why


def test_one_interface_needs_no_variable(tmp_path: Path) -> None:
    assert host.network("ACME_IFNAME", {}, interfaces(tmp_path, lo="unknown", eth0="up")).status == "ok"
    assert "none but the loopback" in host.network("ACME_IFNAME", {}, tmp_path / "absent").why


def test_shared_memory_of_a_container(tmp_path: Path) -> None:
    facts = os.statvfs(tmp_path)
    size = facts.f_blocks * facts.f_frsize
    assert host.shared_memory(size, tmp_path).status == "ok"
    said = host.shared_memory(size + 1, tmp_path)
    assert said.status == "advice" and f"--shm-size={(size + 1) // host.GIB}g" in said.fix
    assert host.shared_memory(1, tmp_path / "absent").status == "unknown"


def test_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"RLIMIT_NOFILE": 1024, "RLIMIT_MEMLOCK": 8 << 20}
    monkeypatch.setattr(host, "_limit", limits.get)
    assert "ulimit -n 65536" in host.open_files(65536).fix
    assert host.open_files(1024).status == "ok"
    assert "8192 KiB" in host.locked_memory().why
    limits.update(RLIMIT_NOFILE=-1, RLIMIT_MEMLOCK=-1)
    assert host.open_files(65536).status == host.locked_memory().status == "ok"
    limits.clear()
    assert host.open_files(1).status == host.locked_memory().status == "unknown"


def test_limits_are_read_off_this_process() -> None:
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert host._limit("RLIMIT_NOFILE") == (-1 if soft == resource.RLIM_INFINITY else soft)


def test_every_status_has_a_meaning() -> None:
    assert set(doctor.STATUSES) == {"ok", "missing", "wrong", "advice", "unknown"}
    assert set(doctor.STATUSES) >= doctor.BROKEN
