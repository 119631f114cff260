"""Building the C++ pack: what its key depends on, races, failures; and what its offers refuse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from grpo_core.errors import PluginError
from grpo_core.impl import DeviceInfo, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_cpu import native
from grpo_cpu.native_offers import offers, refuse

TINY = '#include "tiny.h"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    (folder / "tiny.h").write_text("#define ANSWER 42\n")
    return folder


needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_a_library_is_built_once_and_found_again(tmp_path, sources, capfd):
    first = native.build(tmp_path / "cache", sources)
    assert first.exists() and "compiling" in capfd.readouterr().err
    assert native.build(tmp_path / "cache", sources) == first
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in first.parent.iterdir()) == ["lock", "pack.so"]


@needs_compiler
def test_a_changed_header_is_another_library(tmp_path, sources):
    first = native.build(tmp_path / "cache", sources)
    (sources / "tiny.h").write_text("#define ANSWER 43\n")
    assert native.build(tmp_path / "cache", sources) != first


@needs_compiler
def test_builders_at_the_same_time_make_one_library(tmp_path, sources, monkeypatch):
    compiled, real = [], native._compile
    monkeypatch.setattr(native, "_compile", lambda *a: compiled.append(1) or real(*a))
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(native.build(tmp_path / "c", sources))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(compiled) == 1


@needs_compiler
def test_a_broken_source_is_reported_with_the_compilers_words_and_leaves_nothing(tmp_path, sources):
    (sources / "tiny.cpp").write_text("int answer() { return nonsense; }\n")
    with pytest.raises(PluginError) as caught:
        native.build(tmp_path / "cache", sources)
    assert "nonsense" in caught.value.why and "pin" in caught.value.fix
    assert not list((tmp_path / "cache").rglob("*.so")) and not list((tmp_path / "cache").rglob("*.o"))


def test_without_a_compiler_the_error_says_so(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PluginError, match="cannot be built") as caught:
        native.build(tmp_path / "cache", sources)
    assert "g++" in caught.value.why


def test_a_cache_folder_that_cannot_be_made_is_an_error_of_the_users_kind(tmp_path, sources):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(PluginError, match="cannot be built"):
        native.build(tmp_path / "cache", sources)


def test_cpu_flags_of_a_file(tmp_path):
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert native.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx512_bf16"}
    assert native.cpu_flags(tmp_path / "absent") == frozenset()


def test_offers_are_refused_with_the_reason():
    need = Need(op="norm.rms", facts={"dtype": "bfloat16"})
    info = DeviceInfo(type="cpu", features=frozenset({"avx512_bf16", "compiler"}))
    assert refuse(info, need) is None
    assert "AVX512-BF16" in str(refuse(DeviceInfo(type="cpu", features=frozenset({"compiler"})), need))
    assert "compiler" in str(refuse(DeviceInfo(type="cpu", features=frozenset({"avx512_bf16"})), need))


def test_offers_name_known_ops_on_their_own_hook_and_lead_to_code():
    ops = [offer.op for _, offer in offers()]
    assert len(ops) == len(set(ops)) >= 14
    for hook, offer in offers():
        contract = CONTRACTS[offer.op]
        assert contract.hook == hook and offer.backward == contract.backward
        module, _, attribute = offer.load.partition(":")
        source = Path(native.__file__).parent / f"{module.split('.')[1]}.py"
        assert re.search(rf"^(def|class) {attribute}\b", source.read_text(), re.MULTILINE)


def test_listing_the_offers_imports_no_torch():
    code = "import sys, grpo_cpu.native_offers as o; list(o.offers()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
