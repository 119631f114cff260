"""Versions for CUDA that belong together, with the commands that install them. Data only.

What torch pins (Triton, NCCL, the CUDA libraries) follows from torch; what is built from source beside it,
and nothing else, asks for a toolkit. What is claimed of a row stands in its `basis`.
"""

from __future__ import annotations

from collections.abc import Iterable

from grpo_core.devices.doctor import Row, Step

FLASH_ATTN, ENGINE, FLA, CONV1D = "2.8.3.post2", "2.20.2", "0.6.0", "1.7.0"
BUILDERS = "setuptools wheel packaging ninja psutil pybind11"
"""What the sources of flash-attn, causal-conv1d and Transformer Engine for torch want to be built with."""
AUDITED = "the plugin's calls into torch and into the packages of the row are held against their signatures"
COMPILED = (
    "the Triton kernels were run in this Triton's interpreter and compiled by it; CI takes the newest Triton"
)


def rows() -> Iterable[Row]:
    """The tested rows, the recommended one first."""
    yield _row(
        "torch-2.13", torch="2.13.0", cuda="13.0", triton="3.7.1", python="3.11-3.14", proof="audited",
        basis=f"{AUDITED}; {COMPILED}",
    )  # fmt: skip
    yield _row(
        "torch-2.11", torch="2.11.0", cuda="13.0", triton="3.6.0", python="3.11-3.14", proof="audited",
        basis=f"{AUDITED}; {COMPILED}",
    )  # fmt: skip


def _row(name: str, *, torch: str, cuda: str, triton: str, python: str, proof: str, basis: str) -> Row:
    return Row(
        name=name,
        versions={
            "CUDA": cuda, "torch": torch, "triton": triton, "fla-core": FLA,
            "flash-attn": FLASH_ATTN, "transformer-engine": ENGINE, "Python": python,
        },
        proof=proof,
        basis=basis,
        constraints=f"grpo_cuda/constraints/{name}.txt",
        steps=(*_packages(cuda), *_sources(cuda)),
    )  # fmt: skip


def _packages(cuda: str) -> tuple[Step, ...]:
    major, index = cuda.partition(".")[0], f"https://download.pytorch.org/whl/cu{cuda.replace('.', '')}"
    driver = {"12": "525", "13": "580"}[major]
    return (
        Step(
            why=f"By hand: an NVIDIA driver of {driver} or later, which serves CUDA {major}; `nvidia-smi` "
            "must list the GPUs. In a container: --gpus all --shm-size=1g"
        ),
        Step(
            command=f'pip install -c "$constraints" --index-url {index} torch',
            why=f"torch for CUDA {cuda} from PyTorch's own index; PyPI's build may be for another CUDA",
        ),
        Step(
            command='pip install -c "$constraints" "grpo-core[cuda]"',
            why="Triton, and the kernels of flash-linear-attention: wheels for all that they need",
        ),
    )


def _sources(cuda: str) -> tuple[Step, ...]:
    major = cuda.partition(".")[0]
    return (
        Step(
            command=f'pip install -c "$constraints" {BUILDERS}',
            why="What the builds below import: they run in this environment, beside its torch",
            optional=True,
        ),
        Step(
            command=f'pip install -c "$constraints" --no-build-isolation "flash-attn=={FLASH_ATTN}"',
            why=f"flash-attn: PyPI has its source alone. Needs nvcc of CUDA {cuda} and gcc; "
            "MAX_JOBS=4 keeps the build within 64 GiB of memory",
            optional=True,
        ),
        Step(
            command='pip install -c "$constraints" --no-build-isolation '
            f'"transformer-engine[pytorch,core_cu{major}]=={ENGINE}"',
            why="Transformer Engine: its torch part is built from source against the installed torch. Needs "
            "nvcc, gcc and cuDNN's headers",
            optional=True,
        ),
        Step(
            command=f'pip install -c "$constraints" --no-build-isolation "causal-conv1d=={CONV1D}"',
            why="causal-conv1d, for the short convolutions of gated delta nets: source alone, as flash-attn",
            optional=True,
        ),
        Step(
            command="git clone --depth 1 --recurse-submodules https://github.com/deepseek-ai/FlashMLA && "
            "pip install --no-build-isolation ./FlashMLA",
            why="FlashMLA, for latent attention on capability 9.0 and 10.0: what PyPI has under its name "
            "is an empty pre-release",
            optional=True,
        ),
    )
