"""What is built once: results that are files or folders, failures, and what a key depends on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grpo_core import builds
from grpo_core.errors import PluginError

PRODUCT = builds.Product(name="the pack", instead=", or do without")


def test_a_folder_is_made_once_and_appears_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "key" / "lib"

    def make(scratch: Path) -> Path:
        (scratch / "some" / "where").mkdir(parents=True)
        (scratch / "some" / "where" / "a.so").write_text("code")
        assert not result.exists()
        return scratch / "some" / "where"

    assert builds.once(result, make, PRODUCT) == result and (result / "a.so").read_text() == "code"
    assert "compiling the pack into" in capsys.readouterr().err
    assert builds.once(result, lambda scratch: pytest.fail("again"), PRODUCT) == result
    assert {path.name for path in result.parent.iterdir()} == {"lib", "lock"}


def test_a_failed_build_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(scratch: Path) -> Path:
        (scratch / "half.o").write_text("")
        builds.run([sys.executable, "-c", "print('x'); raise SystemExit('an error here')"], PRODUCT)
        return scratch

    with pytest.raises(PluginError, match="the pack cannot be built") as raised:
        builds.once(tmp_path / "lib", fail, PRODUCT)
    assert "an error here" in raised.value.why and raised.value.fix.endswith(", or do without")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    (tmp_path / "other").write_text("made")
    assert builds.once(tmp_path / "lib", lambda scratch: tmp_path / "other", PRODUCT).read_text() == "made"


def test_a_command_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "TIMEOUT", 0.2)
    with pytest.raises(PluginError, match="cannot be built") as raised:
        builds.run([sys.executable, "-c", "import time; time.sleep(60)"], PRODUCT)
    assert "did not finish" in raised.value.why


def test_a_key_depends_on_facts_names_and_contents(tmp_path: Path) -> None:
    one, other = tmp_path / "a.h", tmp_path / "b.h"
    one.write_text("1")
    other.write_text("1")
    keys = {builds.fingerprint(fact, files) for fact in (1, "1") for files in ([one], [other], [one, other])}
    assert len(keys) == 6
    one.write_text("2")
    assert builds.fingerprint(1, [one]) not in keys
