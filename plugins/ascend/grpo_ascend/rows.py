"""Versions for Ascend that belong together, with the commands that install them. Data only.

CANN and torch-npu are paired as torch-npu's COMPATIBILITY.md of August 2026 has them, vllm-ascend as its
wheel's metadata and installation page want it, MindSpeed as its branches' READMEs say. What is claimed beyond
that stands in each row's `basis`; a test holds it against the audit's surface and the committed reports.
"""

from __future__ import annotations

from collections.abc import Iterable

from grpo_core.devices.doctor import Row, Step

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ASCEND_INDEX = "https://mirrors.huaweicloud.com/ascend/repos/pypi"
"""The vendor's index: it has the triton-ascend releases that PyPI lacks."""
AUDITED = "every call of the plugin is held against this torch-npu's signatures"
RUN = "the conformance suite passed with it over a simulated CANN (conformance/reports/ascend-simulated.json)"
PAIRED = "CANN is the one that the vendor's table pairs with it"


def rows() -> Iterable[Row]:
    """The tested rows, the recommended one first."""
    yield _row(
        "torch-2.10", cann="9.1.0", torch="2.10.0", torch_npu="2.10.0.post4", python="3.11-3.12",
        others={"vllm": "0.23.0", "vllm-ascend": "0.23.0", "triton-ascend": "3.2.2"},
        basis=f"{AUDITED}; {PAIRED}, vllm-ascend 0.23.0 pins both",
        more=_vllm("0.23.0"), beside="torchvision torchaudio",
    )  # fmt: skip
    yield _row(
        "torch-2.13", cann="", torch="2.13.0", torch_npu="2.13.0", python="3.11-3.14",
        basis=f"{AUDITED}; {RUN}; no document of the vendor names its CANN, so take the newest",
        proof="simulated",
    )  # fmt: skip
    yield _row(
        "torch-2.12", cann="9.1.0", torch="2.12.0", torch_npu="2.12.0", python="3.11-3.13",
        basis=f"{AUDITED}; {PAIRED}",
    )  # fmt: skip
    yield _row(
        "torch-2.9", cann="9.1.0", torch="2.9.0", torch_npu="2.9.0.post6", python="3.11-3.13",
        basis=f"{AUDITED}; {PAIRED}",
    )  # fmt: skip
    yield _row(
        "torch-2.7", cann="9.1.0", torch="2.7.1", torch_npu="2.7.1.post8", python="3.11",
        others={"MindSpeed": "26.1.0_core_r0.12.1", "Megatron-LM": "core_v0.12.1"},
        basis=f"{AUDITED}; {PAIRED}. MindSpeed's page names Python 3.10, which grpo-core does not run on",
        more=_mindspeed("26.1.0_core_r0.12.1"),
    )  # fmt: skip
    yield _row(
        "torch-2.7-cann-9.0", cann="9.0.0", torch="2.7.1", torch_npu="2.7.1.post4", python="3.11",
        others={"MindSpeed": "26.0.0_core_r0.12.1", "Megatron-LM": "core_v0.12.1"},
        basis=f"{AUDITED}; {PAIRED}. MindSpeed's page names Python 3.10, which grpo-core does not run on",
        more=_mindspeed("26.0.0_core_r0.12.1"),
    )  # fmt: skip


def _row(
    name: str, *, cann: str, torch: str, torch_npu: str, python: str, basis: str, proof: str = "audited",
    others: dict[str, str] | None = None, more: tuple[Step, ...] = (), beside: str = "",
) -> Row:  # fmt: skip
    toolkit = f"CANN {cann}" if cann else "the newest CANN"
    versions = {"CANN": cann, "torch": torch, "torch-npu": torch_npu, "Python": python, **(others or {})}
    return Row(
        name=name,
        versions={key: value for key, value in versions.items() if value},
        proof=proof,
        basis=basis,
        constraints=f"grpo_ascend/constraints/{name}.txt",
        steps=(*_host(toolkit), *_packages(beside), *more, *_jemalloc()),
    )


def _host(cann: str) -> tuple[Step, ...]:
    return (
        Step(
            why=f"By hand: the driver and firmware that the release notes of {cann} want; `npu-smi info` "
            "must list the chips. In a container: --device=/dev/davinci0 (and the others), "
            "--device=/dev/davinci_manager --device=/dev/devmm_svm --device=/dev/hisi_hdc "
            "-v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro "
            "-v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro -v /etc/hccn.conf:/etc/hccn.conf:ro "
            "--shm-size=1g"
        ),
        Step(
            why=f"By hand: {cann} (toolkit, the ops package of the chip, NNAL) from "
            "https://www.hiascend.com/cann, or one of the images quay.io/ascend/cann, which have them"
        ),
        Step(
            command=". /usr/local/Ascend/cann/set_env.sh",
            why="CANN in this shell and in every shell that trains; an older CANN or an image has it in "
            "/usr/local/Ascend/ascend-toolkit/set_env.sh",
        ),
    )


def _packages(beside: str) -> tuple[Step, ...]:
    return (
        Step(
            command=f'pip install -c "$constraints" --index-url {CPU_INDEX} {f"torch {beside}".strip()}',
            why="torch without CUDA, which PyPI does not have for x86_64; older torch-npu wants just that",
            machine="x86_64",
        ),
        Step(
            command='pip install -c "$constraints" "grpo-core[ascend]"',
            why="torch-npu, and on aarch64 torch with it",
        ),
    )


def _vllm(version: str) -> tuple[Step, ...]:
    build = f"--no-binary vllm vllm=={version}"
    return (
        Step(
            command=f'VLLM_TARGET_DEVICE=empty pip install -c "$constraints" {build}',
            why="For vLLM, which grpo's own engine does not need: built for no device, because its wheel "
            "pins another torch than vllm-ascend does",
            optional=True,
        ),
        Step(
            command=f'pip install -c "$constraints" --extra-index-url {ASCEND_INDEX} triton-ascend',
            why="For vLLM: from the vendor's index, PyPI has no such release",
            optional=True,
        ),
        Step(
            command=f'pip install -c "$constraints" vllm-ascend=={version}',
            why="For vLLM: needs glibc 2.34 for the wheel, or CANN's headers and gcc for a build",
            optional=True,
        ),
        Step(
            command=". /usr/local/Ascend/nnal/atb/set_env.sh",
            why="For vLLM: libatb.so, in every shell that runs it",
            optional=True,
        ),
    )


def _mindspeed(branch: str) -> tuple[Step, ...]:
    return (
        Step(
            command=f"git clone --depth 1 --branch {branch} https://gitcode.com/Ascend/MindSpeed",
            why="For Megatron on Ascend, in an environment of its own: MindSpeed patches torch and Megatron "
            "when it is imported. What PyPI has under its name is a placeholder that cannot be installed",
            optional=True,
        ),
        Step(
            command='pip install -c "$constraints" -e ./MindSpeed',
            why="For Megatron on Ascend",
            optional=True,
        ),
        Step(
            command="git clone --depth 1 --branch core_v0.12.1 https://github.com/NVIDIA/Megatron-LM",
            why="For Megatron on Ascend: its folder goes into PYTHONPATH. No apex is needed: MindSpeed "
            "stands in for it",
            optional=True,
        ),
    )


def _jemalloc() -> tuple[Step, ...]:
    return (
        Step(
            command="apt-get install -y libjemalloc2 && "
            "export LD_PRELOAD=/usr/lib/$(uname -m)-linux-gnu/libjemalloc.so.2",
            why="An allocator for the host that gives memory back; before Python starts",
            optional=True,
        ),
    )
