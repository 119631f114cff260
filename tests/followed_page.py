"""Follows a page of the documentation to the letter: commands run, outputs appear, changes apply.

Blocks without a language are commands. `text` holds lines that the last commands printed, `toml` and
`python` blocks whose first line is a comment with a path are written to it, other `toml` is held against
pyproject.toml, and a `diff` names its file in its first line and must fit in exactly one place.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"# ([\w./-]+\.\w+)\n")
# Installed from the folder, without an index and without isolation: nothing is downloaded. The package itself
# is then read from its folder, as after `pip install -e`.
PIP = """#!/bin/bash
set -e
offline="--disable-pip-version-check --no-cache-dir --quiet --no-deps --no-index --no-build-isolation"
case "$1 $2" in
"install -e")
    "{python}" -m pip install $offline --upgrade --target "{site}" .
    rm -rf "{site}/{package}" ;;
"wheel --no-deps") shift; "{python}" -m pip wheel $offline "$@" ;;
*) echo "the test knows no such pip command: $*" >&2; exit 1 ;;
esac
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every block of a page in docs."""
    return BLOCK.findall((ROOT / "docs" / page).read_text())


def follow(page: str, folder: Path, distribution: str) -> tuple[Path, int]:
    """Follow a page that makes `distribution` in `folder`; returns where it ends and how many blocks ran."""
    package = folder / distribution
    environment = _environment(folder, package)
    here, said, ran = folder, "", 0
    for kind, text in blocks(page):
        path = PATH.match(text)
        if kind == "":
            done = subprocess.run(
                ["bash", "-ec", f"{text}pwd > {folder}/here"], cwd=here, env=environment,
                capture_output=True, text=True, check=False, timeout=600,
            )  # fmt: skip
            said = done.stdout + done.stderr
            assert done.returncode == 0, f"{text}\n{said}"
            here, ran = Path((folder / "here").read_text().strip()), ran + 1
        elif kind == "text":
            plain = " ".join(said.split())
            missing = [line for line in text.splitlines() if " ".join(line.split()) not in plain]
            assert missing == [], said
        elif kind == "diff":
            _apply(text, here)
        elif path:
            (here / path.group(1)).write_text(text.removeprefix(path.group()))
        elif kind == "toml":
            assert text in (here / "pyproject.toml").read_text()
    return here, ran


def _environment(folder: Path, package: Path) -> dict[str, str]:
    """`pip`, `python`, `grpo`, `pytest` and `ruff` of this environment, whatever PATH says."""
    site, bin_ = folder / "site", folder / "bin"
    scripts = {
        "pip": PIP.format(python=sys.executable, site=site, package=package.name.replace("-", "_")),
        "python": f'#!/bin/bash\nexec "{sys.executable}" "$@"\n',
        "grpo": f'#!/bin/bash\nexec "{sys.executable}" -m grpo_core.cli.main "$@"\n',
        "pytest": f'#!/bin/bash\nexec "{sys.executable}" -m pytest -q "$@"\n',
        "ruff": f'#!/bin/bash\nexec "{Path(sys.executable).parent / "ruff"}" "$@" --no-cache\n',
    }
    bin_.mkdir()
    for name, text in scripts.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755 | stat.S_IXUSR)
    paths = (str(site), str(package), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(bin_), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
    }


def _apply(change: str, folder: Path) -> None:
    """Apply one hunk of a diff whose first line names the file; it must fit in exactly one place."""
    head, *lines = change.splitlines()
    path = folder / head.removeprefix("--- ")
    before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
    after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
    text = path.read_text()
    assert text.count(before) == 1, f"{head} does not hold exactly once:\n{before}"
    path.write_text(text.replace(before, after))
