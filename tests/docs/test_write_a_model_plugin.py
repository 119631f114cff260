"""docs/write-a-model-plugin.md, followed to the letter: its commands run and its changes apply."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-model-plugin.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Installed from the folder, without an index and without isolation: nothing is downloaded. The package itself
# is then read from its folder, as after `pip install -e`.
PIP = """#!/bin/bash
set -e
offline="--disable-pip-version-check --no-cache-dir --quiet --no-deps --no-index --no-build-isolation"
case "$1 $2" in
"install -e")
    "{python}" -m pip install $offline --upgrade --target "{site}" .
    rm -rf "{site}/grpo_mistral" ;;
"wheel --no-deps") shift; "{python}" -m pip wheel $offline "$@" ;;
*) echo "the test knows no such pip command: $*" >&2; exit 1 ;;
esac
"""


def shims(folder: Path, site: Path) -> None:
    """`pip`, `python`, `grpo`, `pytest` and `ruff` of this environment, whatever PATH says."""
    scripts = {
        "pip": PIP.format(python=sys.executable, site=site),
        "python": f'#!/bin/bash\nexec "{sys.executable}" "$@"\n',
        "grpo": f'#!/bin/bash\nexec "{sys.executable}" -m grpo_core.cli.main "$@"\n',
        "pytest": f'#!/bin/bash\nexec "{sys.executable}" -m pytest -q "$@"\n',
        "ruff": f'#!/bin/bash\nexec "{Path(sys.executable).parent / "ruff"}" "$@" --no-cache\n',
    }
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755 | stat.S_IXUSR)


def apply(change: str, folder: Path) -> None:
    """Apply one hunk of a diff whose first line names the file; it must fit in exactly one place."""
    head, *lines = change.splitlines()
    path = folder / head.removeprefix("--- ")
    before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
    after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
    text = path.read_text()
    assert text.count(before) == 1, f"{head} does not hold exactly once:\n{before}"
    path.write_text(text.replace(before, after))


@pytest.mark.slow
def test_the_page_can_be_followed(tmp_path: Path) -> None:
    site, bin_ = tmp_path / "site", tmp_path / "bin"
    shims(bin_, site)
    package = tmp_path / "grpo-mistral"
    environment = {
        **os.environ,
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(site), str(package), os.environ.get("PYTHONPATH", "")]).rstrip(
            ":"
        ),
        "OMP_NUM_THREADS": "1",
    }
    here, said, ran = tmp_path, "", 0
    for kind, text in BLOCK.findall(PAGE):
        if kind == "":
            done = subprocess.run(
                ["bash", "-ec", f"{text}pwd > {tmp_path}/here"], cwd=here, env=environment,
                capture_output=True, text=True, check=False, timeout=300,
            )  # fmt: skip
            said = done.stdout + done.stderr
            assert done.returncode == 0, f"{text}\n{said}"
            here, ran = Path((tmp_path / "here").read_text().strip()), ran + 1
        elif kind == "text":
            plain = " ".join(said.split())
            missing = [line for line in text.splitlines() if " ".join(line.split()) not in plain]
            assert missing == [], said
        elif kind == "diff":
            apply(text, here)
        elif kind == "toml":
            assert text in (here / "pyproject.toml").read_text()
        elif text.startswith("# "):
            (here / text.splitlines()[0].removeprefix("# ")).write_text(text)
    assert ran == 5 and here == package
    assert len(list((package / "dist").glob("grpo_mistral-*.whl"))) == 1


def test_the_renamed_tensor_of_the_page_is_renamed() -> None:
    from grpo_core.plugins import load

    (text,) = [
        text for kind, text in BLOCK.findall(PAGE) if kind == "python" and text.startswith("# names.py")
    ]
    space: dict[str, object] = {}
    exec(compile(text, "names.py", "exec"), space)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    arch = load().model_plugin_for(config["architectures"]).arch(config)  # type: ignore[arg-type]
    table = space["weights"](arch)  # type: ignore[operator]
    assert table.hf_names()["model.final_norm.weight"] == (8,)
    assert "model.norm.weight" not in table.hf_names() and "model.embed_tokens.weight" in table.hf_names()


def test_every_check_has_its_row() -> None:
    from grpo_conformance.model_case import MODEL_CHECKS

    assert [check.__name__ for check in MODEL_CHECKS] == re.findall(
        r"^\| `(check_\w+)` \|", PAGE, re.MULTILINE
    )


def test_every_part_of_a_layer_has_its_row() -> None:
    from grpo_core.model import arch

    parts = re.findall(r"^\| `([A-Z]\w+)` \|", PAGE, re.MULTILINE)
    named = str(arch.Layer.__annotations__)
    assert parts and all(part in named for part in parts)
    assert len(parts) == named.count("|") + 2, "a part of Layer has no row"
