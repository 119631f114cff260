"""Plugins of other distributions, really installed: a module and a .dist-info folder on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GOOD = """
from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl

@hookimpl
def grpo_fused_ops():
    yield Impl(op="mlp.swiglu", name="fast", device="*", load="%s.ops:swiglu", backward=True, rank=90)
"""
SHOW = """
import json, sys
from grpo_core.plugins import load
c = load()
print(json.dumps({
    "plugins": [[p.id, p.distribution, p.version, p.module] for p in c.plugins],
    "failures": [[f.plugin, f.distribution, f.where, f.error, f.fix] for f in c.failures],
    "swiglu": [offer.id for offer in c.offers["mlp.swiglu"]],
    "torch": "torch" in sys.modules,
}))
"""


def install(site: Path, distribution: str, entry: str, module: str, code: str, version: str = "1.0") -> None:
    """Put a distribution with one entry point into `site`."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[grpo.plugins]\n{entry} = {module}\n")
    (site / f"{module}.py").write_text(code)


def ask(*sites: Path, code: str = SHOW) -> Any:
    """What a fresh interpreter with these folders on its path says, as JSON."""
    path = os.pathsep.join([*map(str, sites), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_third_party_plugin_is_found_with_its_distribution(tmp_path: Path) -> None:
    install(tmp_path, "acme-grpo", "acme", "acme_plugin", GOOD % "acme", version="2.5")
    said = ask(tmp_path)
    assert ["acme", "acme-grpo", "2.5", "acme_plugin"] in said["plugins"]
    assert "acme:fast" in said["swiglu"] and said["failures"] == [] and not said["torch"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (
            "import acme_runtime_that_is_absent",
            "ModuleNotFoundError: No module named 'acme_runtime_that_is_absent'",
        ),
        ("raise RuntimeError('driver 12 wanted')", "RuntimeError: driver 12 wanted"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_plugin_that_cannot_be_imported_does_not_stop_the_rest(
    tmp_path: Path, code: str, error: str
) -> None:
    install(tmp_path, "acme-grpo", "acme", "acme_plugin", code)
    install(tmp_path, "other-grpo", "other", "other_plugin", GOOD % "other")
    said = ask(tmp_path)
    [(plugin, distribution, where, message, fix)] = said["failures"]
    assert (plugin, distribution, where) == ("acme", "acme-grpo 1.0", "import")
    assert message.startswith(error) and "plugins_off: [acme]" in fix
    assert "other:fast" in said["swiglu"]


def test_an_entry_point_without_its_module_is_a_failure(tmp_path: Path) -> None:
    install(tmp_path, "acme-grpo", "acme", "acme_plugin", "")
    (tmp_path / "acme_plugin.py").unlink()
    [(plugin, _, where, message, _)] = ask(tmp_path)["failures"]
    assert (plugin, where) == ("acme", "import") and "acme_plugin" in message


@pytest.mark.parametrize("flipped", [False, True])
def test_of_two_plugins_with_one_name_the_first_distribution_wins(tmp_path: Path, flipped: bool) -> None:
    sites = [tmp_path / "one", tmp_path / "two"]
    install(sites[0], "aaa-grpo", "acme", "aaa_plugin", GOOD % "aaa")
    install(sites[1], "zzz-grpo", "acme", "zzz_plugin", GOOD % "zzz")
    said = ask(*(reversed(sites) if flipped else sites))
    assert ["acme", "aaa-grpo", "1.0", "aaa_plugin"] in said["plugins"]
    [(plugin, distribution, where, message, fix)] = said["failures"]
    assert (plugin, distribution, where) == ("acme", "zzz-grpo 1.0", "name")
    assert "aaa-grpo 1.0 (aaa_plugin)" in message and "zzz-grpo 1.0 (zzz_plugin)" in message
    assert fix == "uninstall aaa-grpo or zzz-grpo"


def test_a_bundled_name_cannot_be_taken_by_a_distribution_that_sorts_first(tmp_path: Path) -> None:
    install(tmp_path, "aaa-grpo", "core", "aaa_plugin", GOOD % "aaa")
    said = ask(tmp_path)
    assert ["core", "grpo-core"] in [row[:2] for row in said["plugins"]]
    assert [row[1] for row in said["failures"]] == ["aaa-grpo 1.0"]


BIND = """
import json, sys
from grpo_core.backend import import_pointer
from grpo_core.impl import DeviceInfo, Need
from grpo_core.plugins import load
from grpo_core.resolve import resolve
plan = resolve([Need(op="mlp.swiglu", backward=True)], load(), DeviceInfo(type="cpu"))
[row] = plan.choices
print(json.dumps([row.chosen, plan.to_json()["plugins"], import_pointer(row.load)(3)]))
"""


def test_a_third_party_offer_is_chosen_and_imported(tmp_path: Path) -> None:
    install(tmp_path, "acme-grpo", "acme", "acme_plugin", GOOD % "acme_package")
    (tmp_path / "acme_package").mkdir()
    (tmp_path / "acme_package" / "ops.py").write_text("def swiglu(gate_up):\n    return gate_up + 1\n")
    chosen, plugins, result = ask(tmp_path, code=BIND)
    assert chosen == "acme:fast" and result == 4
    assert {"id": "acme", "distribution": "acme-grpo", "version": "1.0"} in plugins
