"""What extras name, and what the wheel holds of what doctors read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from grpo_ascend.offers import offers as ascend_offers
from grpo_core.ops.contract import CONTRACTS
from grpo_cuda.offers import offers as cuda_offers

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
FORBIDDEN = re.compile(r"vllm-ascend|mindspeed(-.*)?|triton-ascend|apex|transformer-engine(-.*)?|flash-mla")
"""Pinned to another torch than its partner, a placeholder that raises, not on PyPI in the release that is
wanted, a web toolkit of 2013 under NVIDIA's name, a build from source against the installed torch, empty."""
FROM_SOURCE = {"flash"}
"""Extras whose packages have no wheels: each alone, so that whoever asks for it knows."""


def names(extra: str) -> set[str]:
    """Distributions of an extra, those of extras that it includes too."""
    found: set[str] = set()
    for requirement in map(Requirement, EXTRAS[extra]):
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            found |= {name for included in requirement.extras for name in names(included)}
        else:
            found.add(canonicalize_name(requirement.name))
    return found


@pytest.mark.parametrize("name", ["apex", "mindspeed-llm", "transformer-engine-torch", "vllm-ascend"])
def test_the_pattern_knows_what_must_not_be_named(name: str) -> None:
    assert FORBIDDEN.fullmatch(name)


def test_no_extra_names_what_cannot_be_resolved() -> None:
    found = {extra: [name for name in names(extra) if FORBIDDEN.fullmatch(name)] for extra in EXTRAS}
    assert not {extra: listed for extra, listed in found.items() if listed}


def test_what_is_built_from_source_stands_alone() -> None:
    assert names("flash") == {"flash-attn"}
    for extra in EXTRAS.keys() - FROM_SOURCE:
        assert not names(extra) & {"flash-attn", "causal-conv1d", "mamba-ssm"}, extra


def test_a_backend_that_needs_its_runtime_comes_only_when_asked_for() -> None:
    """torch loads it with `import torch`, which fails where CANN is not installed."""
    assert [extra for extra in EXTRAS if "torch-npu" in names(extra)] == ["ascend"]


def test_torch_is_not_pinned() -> None:
    """A chip's backend pins torch exactly; a pin of ours would shut some out."""
    [torch] = [item for item in map(Requirement, PROJECT["dependencies"]) if item.name == "torch"]
    assert [clause.operator for clause in torch.specifier] == [">="]


def test_extras_of_both_chips_are_for_the_systems_that_have_wheels() -> None:
    [npu] = [item for item in map(Requirement, EXTRAS["ascend"]) if item.name == "torch-npu"]
    assert npu.marker is not None
    for system, machine, wanted in (
        ("linux", "aarch64", True), ("linux", "x86_64", True), ("darwin", "arm64", False),
        ("win32", "AMD64", False),
    ):  # fmt: skip
        assert npu.marker.evaluate({"sys_platform": system, "platform_machine": machine}) is wanted


@pytest.mark.parametrize(("extra", "offers"), [("cuda", cuda_offers), ("ascend", ascend_offers)])
def test_no_extra_installs_what_all_its_offers_refuse(extra: str, offers: Any) -> None:
    """`cuda` asked for Triton 3.2 while every kernel wanted 3.6."""
    impls = [impl for hook in {contract.hook for contract in CONTRACTS.values()} for impl in offers(hook)]
    wanted = [Requirement(item) for impl in impls for item in impl.requires]
    for asked in map(Requirement, EXTRAS[extra]):
        [oldest] = [clause.version for clause in asked.specifier if clause.operator == ">="]
        admitted = [item for item in wanted if item.name == asked.name and oldest in item.specifier]
        assert admitted, f"no offer takes {asked.name} {oldest}"
