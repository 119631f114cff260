"""What plans say of the Ascend plugin where there is none, and that its calls fit the vendor's package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import grpo_ascend
from grpo_ascend import offers as table
from grpo_conformance.audit.check import audit
from grpo_conformance.audit.surface import load as load_surface
from grpo_core.cli.main import main
from grpo_core.config_loader import load_config
from grpo_core.errors import PlanError
from grpo_core.impl import Impl, Need
from grpo_core.needs import RunFacts, needs_of
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import Plan
from grpo_core.planning import plan_run
from grpo_core.plugins import load
from grpo_core.resolve import resolve
from grpo_models.plugin import grpo_models

PACKAGE = Path(grpo_ascend.__file__).parent
PUBLISHED = Path(__file__).parents[1] / "models" / "published"
HOOKS = sorted({contract.hook for contract in CONTRACTS.values()})
ENGINES = ("engine.rollout", "engine.train")
NEVER = {"attention.varlen", "attention.cache", "norm.rms", "rope.apply", "mlp.swiglu", "optim.adamw"}
"""Ops that plain torch never serves here."""


def impls() -> list[Impl]:
    return [impl for hook in HOOKS for impl in table.offers(hook)]


def test_every_call_fits_every_version_that_the_offers_admit() -> None:
    result = audit(PACKAGE, impls(), load_surface(PACKAGE))
    assert not result.findings, "\n".join(map(str, result.findings))
    assert result.calls > 30
    for offer, _, versions in result.offers:
        assert {"2.7.1.post8", "2.9.0.post9", "2.10.0.post4", "2.13.0"} <= set(versions), offer
        assert not {"2.7.1", "2.8.0", "2.9.0"} & set(versions), offer


@pytest.mark.parametrize(
    ("file", "before", "after", "kind"),
    [
        ("fusion.py", "actual_seq_kvlen=", "actual_seq_kvlens=", "unknown keyword"),
        ("fusion.py", '"TND"', '"THD"', "value"),
        ("infer.py", '"TND"', '"SBH"', "value"),
        ("infer.py", 'cache_mode="Norm",', "", "not explicit"),
        ("moe.py", "npu_moe_token_permute(", "npu_moe_token_permute_v9(", "unknown op"),
        ("grouped.py", "apply: Any = _GroupedLinear.apply", "apply: Any = _by_rows", "no gradient"),
        ("grouped.py", "def backward(", "def backwards(", "half a backward"),
        ("norm.py", "epsilon=eps", "eps=eps", "unknown keyword"),
    ],
)  # fmt: skip
def test_an_error_planted_in_the_plugin_is_found(
    tmp_path: Path, file: str, before: str, after: str, kind: str
) -> None:
    copy = tmp_path / "grpo_ascend"
    copy.mkdir()
    for path in PACKAGE.glob("*.*"):
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert before in text
            text = text.replace(before, after)
        (copy / path.name).write_text(text, encoding="utf-8")
    found = audit(copy, impls(), load_surface(copy)).findings
    assert kind in {finding.kind for finding in found}


def test_an_offer_for_older_releases_too_is_found_out() -> None:
    from dataclasses import replace

    older = [replace(impl, requires=("torch-npu>=2.7.1",)) for impl in impls()]
    found = audit(PACKAGE, older, load_surface(PACKAGE)).findings
    assert any("cache_mode" in str(one) and "2.9.0" in one.versions for one in found)
    assert any(one.kind == "unknown op" and "2.7.1" in one.versions for one in found)


def test_offers_are_for_npus_alone() -> None:
    assert {impl.device for impl in impls()} == {"npu"}


def test_without_torch_npu_every_offer_says_what_it_needs() -> None:
    catalogue = load()
    assert not catalogue.failures
    info = catalogue.devices["ascend"].probe().info
    need = Need(op="mlp.swiglu", facts={"dtype": "bfloat16", "intermediate_size": 8}, backward=True)
    with pytest.raises(PlanError, match=r"nothing serves mlp\.swiglu on npu") as error:
        resolve([need], catalogue, info)
    assert "ascend:npu: needs torch-npu" in error.value.why


def plan_of(name: str, **facts: Any) -> Plan:
    config = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    families = {known: family for family in grpo_models() for known in family.architectures}
    arch = families[config["architectures"][0]].arch(config)
    catalogue = load()
    run = RunFacts(**{"train_dtype": "bfloat16", "rollout_dtype": "bfloat16", "world": 8, **facts})
    needs = [need for need in needs_of(arch, run) if need.op not in ENGINES]
    return resolve(needs, catalogue, catalogue.devices["ascend"].probe().info, on_paper=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in PUBLISHED.glob("*.json")))
def test_published_models_are_served_without_a_fallback(name: str) -> None:
    plan = plan_of(name)
    for row in plan.choices:
        assert not row.fallback
        assert row.chosen or row.op in ("moe.layer", "attention.step"), row
        assert row.op not in NEVER or str(row.chosen).endswith((":npu", ":paged")), row
    assert any("torch-npu" in note and "not installed" in note for note in plan.notes)


def test_which_kernels_serve_a_mixture_with_latent_attention() -> None:
    chosen = {row.op: row.chosen for row in plan_of("DeepSeek-V3-0324").choices}
    parts = ("mla.varlen", "mla.prefill", "mla.decode", "moe.route", "moe.dispatch", "moe.experts")
    assert {chosen[op] for op in parts} == {"ascend:npu"}
    assert chosen["comm.collectives"] == "ascend:hccl" and chosen["mla.cache"] == "ascend:paged"


def test_float32_goes_to_plain_torch_where_the_vendor_has_halves_only() -> None:
    plan = plan_of("Qwen2.5-7B", train_dtype="float32", rollout_dtype="float32")
    assert plan.choice("attention.decode").chosen == "ascend:torch"
    assert plan.choice("attention.varlen").chosen == "ascend:npu"
    refused = {item.id: item.reason for item in plan.choice("attention.decode").passed}
    assert refused["ascend:npu"] == "dtype=float32 not in {bfloat16, float16}"


def test_router_logits_in_float64_are_refused() -> None:
    with pytest.raises(PlanError, match=r"moe\.route") as error:
        plan_of("Qwen3-30B-A3B", router_dtype="float64")
    assert "router_dtype=float64 not in {float32}" in error.value.why


@pytest.mark.parametrize(
    ("experts", "groups", "reason"),
    [(256, 8, None), (256, 1, None), (8, 4, "groups of 2"), (640, 128, "fill 4096 places")],
)
def test_groups_of_experts(experts: int, groups: int, reason: str | None) -> None:
    info = load().devices["ascend"].probe().info
    need = Need(op="moe.route", facts={"num_experts": experts, "num_groups": groups})
    said = table.expert_groups(info, need)
    assert said is None if reason is None else reason in str(said)


def test_grpo_plan_for_a_device_that_is_not_here(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_recipe), "device=ascend", "train.dtype=bfloat16", "--why"]) == 0
    text = capsys.readouterr().out
    assert "Ascend NPU, not here: planned on paper" in text
    assert "attention.varlen" in text and "ascend:npu" in text
    assert "x cpu:torch" in text and "for cpu, not npu" in text
    assert "on paper: device ascend is not here (no device file matches" in text
    assert "on paper: needs torch-npu" in text


def test_grpo_train_refuses_it_with_the_reasons(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_recipe), "device=ascend"]) == 2
    text = capsys.readouterr().err
    assert "device 'ascend' was asked for but is not here" in text
    assert "CANN is not installed" in text and 'pip install "grpo-core[ascend]"' in text


def test_the_matrix_shows_the_level_of_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--matrix"]) == 0
    text = capsys.readouterr().out
    (note,) = set(re.findall(r"ascend:npu \[simulated\] \((\d+)\)", text))
    assert f"({note}) needs torch-npu" in text
    assert "[simulated] the conformance suite passed on the vendor's package over a simulated chip" in text


def test_the_command_audits_an_installed_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "audit", "ascend"]) == 0
    assert "0 findings" in capsys.readouterr().out
    assert main(["conformance", "audit", "cpu"]) == 2
    assert "no surface of a vendor" in capsys.readouterr().err


def test_a_run_records_the_version_of_the_package_that_served_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((PUBLISHED / "Qwen2.5-7B.json").read_text())
    file = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
    loaded = load_config(file, ["device=ascend", f"model={tmp_path}"])
    assert plan_run(loaded, weights=False, absent=True).packages() == ["grpo-core", "torch-npu"]
