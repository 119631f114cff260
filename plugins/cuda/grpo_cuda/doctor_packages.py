"""Packages beside torch on a CUDA host: which are there, and whether they belong together."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path

from grpo_core.devices.doctor import ADVICE, OK, Check
from grpo_core.requirements import installed_version, unmet

TOOLKIT = Path("/usr/local/cuda")
SOURCE = "it is built from source, with nvcc and gcc"
PLAN = "grpo doctor --device cuda --install-plan"


def packages(built_for: str, environment: Mapping[str, str]) -> Iterator[Check]:
    """`built_for` is the CUDA version of the installed torch, "" for none."""
    yield _pinned("triton", "triton", "the plugin's own kernels need it; torch's serve without")
    yield _fla()
    yield _built("flash-attn", "torch's attention serves")
    yield _built("causal-conv1d", "short convolutions of gated delta nets run on Triton")
    yield _built("flash-mla", "latent attention decodes on slower kernels")
    yield _transformer_engine(built_for)
    yield from _apex()
    if built_for:
        name = f"nvidia-nccl-cu{built_for.partition('.')[0]}"
        yield _pinned("NCCL", name, "ranks on several GPUs talk through it, torch's own build of it aside")
    yield _toolkit(built_for, environment)


def _pinned(part: str, name: str, use: str) -> Check:
    """A package that torch names in its own requirements, held against them."""
    version = installed_version(name)
    wanted = [item for item in _requires("torch") if re.match(re.escape(name) + r"\b(?!-)", item)]
    wanted = [item for item in wanted if unmet(item)]
    fix = (
        f"pip install '{wanted[0].partition(';')[0].strip()}'" if wanted else "pip install 'grpo-core[cuda]'"
    )
    if version is None:
        return Check(part=part, status=ADVICE, why=f"{name} is not installed; {use}", fix=fix)
    if wanted:
        return Check(part=part, status=ADVICE, why=f"torch {unmet(wanted[0])}", fix=fix)
    return Check(part=part, status=OK, why=f"{name} {version}")


def _fla() -> Check:
    part = "flash-linear-attention"
    outer, inner = installed_version(part), installed_version("fla-core")
    if inner is None:
        return Check(
            part=part, status=ADVICE, why="not installed; gated delta nets run on slower kernels without it",
            fix='pip install "grpo-core[cuda]"',
        )  # fmt: skip
    if outer is not None and outer != inner:
        return Check(
            part=part, status=ADVICE, why=f"flash-linear-attention {outer} with fla-core {inner}",
            fix=f"pip install flash-linear-attention=={inner}",
        )  # fmt: skip
    return Check(part=part, status=OK, why=f"fla-core {inner}")


def _built(name: str, without: str) -> Check:
    """A package that PyPI has no wheels of, or a placeholder."""
    version = installed_version(name)
    if version is None:
        return Check(
            part=name,
            status=ADVICE,
            why=f"not installed; {without} without it; {SOURCE}",
            fix=f"see `{PLAN}`",
        )
    return Check(part=name, status=OK, why=version)


def _transformer_engine(built_for: str) -> Check:
    part = "Transformer Engine"
    names = (
        "transformer-engine",
        "transformer-engine-torch",
        "transformer-engine-cu12",
        "transformer-engine-cu13",
    )
    found = {name: version for name in names if (version := installed_version(name))}
    if not found:
        return Check(
            part=part, status=ADVICE,
            why=f"not installed; other offers serve without it; {SOURCE} and cuDNN's headers",
            fix=f"see `{PLAN}`",
        )  # fmt: skip
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    want = f"transformer-engine-cu{built_for.partition('.')[0]}"
    lacking = [name for name in ("transformer-engine", "transformer-engine-torch", want) if name not in found]
    if len(set(found.values())) > 1 or (lacking and built_for):
        tail = f"; missing: {', '.join(lacking)}" if lacking else "; they must be one release"
        return Check(part=part, status=ADVICE, why=said + tail, fix=f"install one release, as `{PLAN}` does")
    return Check(part=part, status=OK, why=said)


def _apex() -> Iterator[Check]:
    """PyPI's "apex" is a web toolkit of 2013; nothing here needs NVIDIA's."""
    if installed_version("apex") and util.find_spec("amp_C") is None:
        version = installed_version("apex")
        yield Check(
            part="apex", status=ADVICE, why=f"apex {version} is not NVIDIA's, and that one is not needed",
            fix="pip uninstall apex",
        )  # fmt: skip


def _toolkit(built_for: str, environment: Mapping[str, str]) -> Check:
    """nvcc, which only builds from source ask for, held against the CUDA of torch."""
    folder = Path(environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or TOOLKIT)
    nvcc = shutil.which("nvcc", path=environment.get("PATH")) or shutil.which(
        "nvcc", path=str(folder / "bin")
    )
    if nvcc is None:
        return Check(
            part="toolkit", status=ADVICE, why="no nvcc; only builds from source (flash-attn, TE) ask for it",
            fix=f"install the CUDA toolkit {built_for or 'of the torch that you use'}, and export CUDA_HOME",
        )  # fmt: skip
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    version = found.group(1) if found else "unknown"
    if built_for and version.partition(".")[0] != built_for.partition(".")[0]:
        return Check(
            part="toolkit", status=ADVICE,
            why=f"{nvcc} is of CUDA {version}, torch of {built_for}: what it builds does not fit torch",
            fix=f"export CUDA_HOME with a toolkit of CUDA {built_for}",
        )  # fmt: skip
    return Check(part="toolkit", status=OK, why=f"{nvcc}, CUDA {version}")


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
