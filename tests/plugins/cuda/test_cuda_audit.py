"""Every call of the CUDA plugin fits each release that its offers admit, and planted errors are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import grpo_cuda
from grpo_conformance.audit.check import Audit, audit
from grpo_conformance.audit.read import parse_package
from grpo_conformance.audit.run import with_installed
from grpo_conformance.audit.surface import load
from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS
from grpo_cuda import offers as table

PACKAGE = Path(grpo_cuda.__file__).parent
HOOKS = sorted({contract.hook for contract in CONTRACTS.values()})


def impls() -> list[Impl]:
    return [impl for hook in HOOKS for impl in table.offers(hook)]


@pytest.fixture(scope="module")
def result() -> Audit:
    return audit(PACKAGE, impls(), load(PACKAGE))


def test_every_call_fits_every_version_that_the_offers_admit(result: Audit) -> None:
    assert not result.findings, "\n".join(map(str, result.findings))
    assert result.calls > 100


def test_the_versions_that_the_offers_are_held_against(result: Audit) -> None:
    held: dict[str, set[str]] = {}
    for _, ops, versions in result.offers:
        for op in ops:
            held.setdefault(op.partition(".")[0], set()).update(versions)
    assert {"2.6.3", "2.7.4.post1", "2.8.3"} <= held["flash_attn"] and "2.4.3" not in held["flash_attn"]
    assert {"2.8.0", "2.16.0"} <= held["transformer_engine"]
    assert {"3.6.0", "3.9.0"} <= held["triton"]
    assert {"2.6.0", "2.9.1", "2.13.0"} <= held["torch"]


def test_what_claims_a_proof_was_read(result: Audit) -> None:
    calling = {title for title, ops, versions in result.offers if ops and versions}
    modules = parse_package(PACKAGE)
    for impl in impls():
        title = f"{impl.op} {impl.name}"
        own = impl.load.partition(":")[0] in modules
        assert own == bool(impl.proof), f"{title} claims {impl.proof!r}"
        assert not impl.symbols or title in calling, f"{title} calls nothing of a vendor's"


def test_the_torch_that_is_installed() -> None:
    surfaces = [with_installed(one) for one in load(PACKAGE) if one.distribution == "torch"]
    assert any("installed" in version for one in surfaces for version in one.versions)
    found = [finding for finding in audit(PACKAGE, impls(), surfaces).findings if finding.kind != "symbols"]
    assert not found, "\n".join(map(str, found))


PACKAGES = {
    "flash.py": "flash-attn",
    "engine.py": "transformer-engine",
    "moe_te.py": "transformer-engine",
    "varlen.py": "torch",
    "flex.py": "torch",
    "triton_norm.py": "triton",
}
PLANTED = [
    ("flash.py", "cu_seqlens_k=", "cu_seqlens_kv=", "unknown keyword"),
    ("flash.py", "import flash_attn_varlen_func", "import flash_attn_varlen", "unknown op"),
    ("flash.py", "Tensor = flash_attn_varlen_func(", "Tensor = flash_attn_with_kvcache(", "no gradient"),
    ("flash.py", "softmax_scale=scale,", "", "not explicit"),
    ("flash.py", "causal=causal,", "causal=causal, dropout_p=0.1,", "value"),
    ("engine.py", 'qkv_format="thd"', 'qkv_format="tnd"', "value"),
    ("engine.py", 'attn_mask_type="padding_causal"', 'attn_mask_type="causal"', "value"),
    ("engine.py", "cu_seqlens_kv=ends_k,", "", "goes together"),
    ("engine.py", "num_gqa_groups=", "num_kv_groups=", "unknown keyword"),
    ("varlen.py", "window_size=sides(window, causal)", "is_causal=causal", "unknown keyword"),
    ("flex.py", "block_mask=mask", "mask=mask", "unknown keyword"),
    ("moe_te.py", 'map_type="mask")\n', ")\n", "not explicit"),
    ("moe_te.py", "merging_probs=", "probs=", "forbidden"),
    ("moe_te.py", "(rows_RK.contiguous(), counts)", "(rows_RK.contiguous(),)", "missing argument"),
    ("triton_norm.py", "def backward(", "def backwards(", "half a backward"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "before", "after", "kind"), PLANTED)
def test_an_error_planted_in_the_plugin_is_found(
    tmp_path: Path, file: str, before: str, after: str, kind: str
) -> None:
    copy = tmp_path / "grpo_cuda"
    copy.mkdir()
    for path in PACKAGE.glob("*.*"):
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert before in text, f"{file} has no {before!r} any more"
            text = text.replace(before, after)
        (copy / path.name).write_text(text, encoding="utf-8")
    found = audit(copy, impls(), [one for one in load(copy) if one.distribution == PACKAGES[file]]).findings
    assert kind in {finding.kind for finding in found}


def wider(name: str, requires: str) -> Iterator[Impl]:
    """The offers, those of one package with another range of its versions."""
    for impl in impls():
        others = tuple(one for one in impl.requires if not one.startswith(name))
        changed = len(others) < len(impl.requires)
        yield replace(impl, requires=(*others, requires)) if changed else impl


@pytest.mark.parametrize(
    ("name", "requires", "kind"),
    [
        ("flash-attn", "flash-attn>=2.3", "versions"),
        ("flash-attn", "flash-attn>=4", "versions"),
        ("transformer-engine", "transformer-engine", "versions"),
        ("torch", "torch>=2.6", "unknown op"),
    ],
)
def test_a_wrong_range_of_versions_is_found(name: str, requires: str, kind: str) -> None:
    surfaces = [one for one in load(PACKAGE) if one.distribution == name]
    found = audit(PACKAGE, list(wider(name, requires)), surfaces).findings
    assert kind in {finding.kind for finding in found}
