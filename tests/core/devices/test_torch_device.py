"""A device over `torch.get_device_module`: its probe from packages, files and the visibility variable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_core.devices.torch_device import TorchDevice
from grpo_core.errors import PluginError

VISIBLE = "ACME_TEST_VISIBLE"


@pytest.fixture
def acme(tmp_path: Path) -> TorchDevice:
    """A device type whose two device files exist."""
    for index in range(2):
        (tmp_path / f"acme{index}").write_text("")
    (tmp_path / "acme_ctl").write_text("")
    return TorchDevice(
        name="acme", type="acme", vendor="Acme", visible_env=VISIBLE, comm="accl", packages=("json",),
        files=f"{tmp_path}/acme[0-9]*", product="Acme One",
    )  # fmt: skip


def test_device_files_are_counted(acme: TorchDevice) -> None:
    said = acme.probe()
    assert said.found and said.info.count == 2 and said.reason == "2 found"
    assert (said.info.name, said.info.vendor) == ("Acme One", "Acme")


def test_without_a_file_pattern_the_declared_number_counts(acme: TorchDevice) -> None:
    assert replace(acme, files="").probe().info.count == 1
    assert replace(acme, files="", count=3).probe().info.count == 3


@pytest.mark.parametrize(
    ("value", "count"),
    [("0,1", 2), ("1", 1), ("0,1,2,3", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), (" 0 , 1 ", 2)],
)
def test_the_visibility_variable_limits_what_is_found(
    acme: TorchDevice, monkeypatch: pytest.MonkeyPatch, value: str, count: int
) -> None:
    monkeypatch.setenv(VISIBLE, value)
    said = acme.probe()
    assert (said.found, said.info.count) == (count > 0, count)
    assert said.reason == f"{count} of 2 visible by {VISIBLE}={value}"


def test_a_missing_package_is_told_without_importing_anything(acme: TorchDevice) -> None:
    said = replace(acme, packages=("acme_torch_absent",)).probe()
    assert not said.found and said.reason == "package acme_torch_absent is not installed"


def test_no_device_file_is_told(acme: TorchDevice, tmp_path: Path) -> None:
    said = replace(acme, files=f"{tmp_path}/other*").probe()
    assert not said.found and "no device file matches" in said.reason


def test_a_device_type_that_torch_does_not_know_is_three_lines(acme: TorchDevice) -> None:
    with pytest.raises(PluginError) as raised:
        acme.open(0)
    assert raised.value.what == "torch has no device type 'acme'"
    assert len(str(raised.value).splitlines()) == 3


def test_a_device_of_this_torch_opens_and_synchronizes() -> None:
    # The module of the host is the only one that every torch has.
    host = TorchDevice(name="host", type="cpu", vendor="", visible_env="", comm="")
    assert host.open(0) == torch.device("cpu", 0)
    host.synchronize()
    with pytest.raises(PluginError, match="host:7 cannot be opened"):
        host.open(7)


def test_everything_goes_through_the_types_own_module(
    acme: TorchDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    module = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        set_device=lambda device: calls.append(("set", device)),
        synchronize=lambda: calls.append("sync"),
        get_rng_state=lambda: torch.arange(3, dtype=torch.uint8),
        set_rng_state=lambda state: calls.append(("rng", state.tolist())),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"xpu": module}[kind])
    device = replace(acme, type="xpu")
    opened = device.open(1)
    device.synchronize()
    device.set_rng_state(device.rng_state())
    assert opened == torch.device("xpu", 1)
    assert calls == [("set", opened), "sync", ("rng", [0, 1, 2])]
