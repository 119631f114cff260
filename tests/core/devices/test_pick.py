"""Which device a run gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest
from plan_helpers import catalogue_of

from grpo_core.catalogue import Catalogue
from grpo_core.devices.base import Probe
from grpo_core.devices.cpu import Cpu
from grpo_core.devices.pick import pick_device
from grpo_core.errors import ConfigError, PluginError
from grpo_core.impl import DeviceInfo


@dataclass(frozen=True, kw_only=True)
class Fake:
    name: str
    type: str
    count: int = 0
    memory: int = 0
    features: frozenset[str] = frozenset()

    def probe(self) -> Probe:
        info = DeviceInfo(
            type=self.type, name=f"{self.name} chip", count=self.count, memory_bytes=self.memory,
            features=self.features,
        )  # fmt: skip
        return Probe(found=self.count > 0, reason=f"{self.count} of {self.name}", info=info)


@dataclass(frozen=True, kw_only=True)
class Raising:
    name: str = "bad"
    type: str = "bad"

    def probe(self) -> Probe:
        raise OSError("driver hangs")


def catalogue(*devices: object) -> Catalogue:
    listed = {device.name: device for device in (Cpu(), *devices)}  # type: ignore[attr-defined]
    return replace(catalogue_of({}), devices=MappingProxyType(listed))  # type: ignore[arg-type]


def picked(name: str, *devices: object) -> str:
    device, info = pick_device(name, catalogue(*devices))
    assert info.type == device.type
    return device.name


def test_auto_is_the_cpu_when_there_is_nothing_else() -> None:
    assert picked("auto") == "cpu"
    assert picked("auto", Fake(name="acme", type="acme", count=0), Raising()) == "cpu"


def test_auto_passes_over_a_simulated_device() -> None:
    toy = Fake(name="toy", type="toy", count=8, memory=1000, features=frozenset({"simulated"}))
    assert picked("auto", toy) == "cpu" and picked("toy", toy) == "toy"
    assert picked("auto", toy, Fake(name="b", type="b", count=1, memory=10)) == "b"


def test_auto_prefers_any_found_accelerator_and_of_several_the_most_memory() -> None:
    small = Fake(name="a", type="a", count=1, memory=10)
    large = Fake(name="b", type="b", count=4, memory=10)
    assert picked("auto", small) == "a"
    assert picked("auto", small, large) == picked("auto", large, small) == "b"


def test_a_device_goes_by_its_name_or_its_torch_type() -> None:
    acme = Fake(name="acme", type="privateuse", count=1)
    assert picked("acme", acme) == picked("privateuse", acme) == "acme"


def test_a_stand_in_of_type_cpu_does_not_take_the_place_of_the_cpu() -> None:
    stand_in = Fake(name="acme", type="cpu", count=1, memory=1 << 50)
    assert picked("acme", stand_in) == "acme"
    assert picked("cpu", stand_in) == picked("auto", stand_in) == "cpu"
    listed = MappingProxyType({"acme": stand_in, "cpu": Cpu()})
    assert pick_device("cpu", replace(catalogue_of({}), devices=listed))[0].name == "cpu"  # type: ignore[arg-type]


def test_an_absent_device_is_three_lines_with_what_was_found() -> None:
    with pytest.raises(PluginError) as raised:
        pick_device("acme", catalogue(Fake(name="acme", type="x"), Fake(name="b", type="b", count=1)))
    assert raised.value.what == "device 'acme' was asked for but is not here"
    assert raised.value.why.startswith("0 of acme. Found: b (b chip), cpu (")
    assert len(str(raised.value).splitlines()) == 3


def test_a_probe_that_raises_is_a_reason() -> None:
    with pytest.raises(PluginError) as raised:
        pick_device("bad", catalogue(Raising()))
    assert "its probe raised OSError: driver hangs" in raised.value.why


def test_an_unknown_device_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'acme'"):
        pick_device("acne", catalogue(Fake(name="acme", type="x")))
