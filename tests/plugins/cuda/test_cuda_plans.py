"""What plans say of the CUDA plugin, with GPUs of several kinds and with none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_core.cli.main import main
from grpo_core.impl import DeviceInfo, Impl, Need
from grpo_core.needs import RunFacts, needs_of
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import Plan
from grpo_core.plugins import load
from grpo_core.resolve import resolve
from grpo_cuda import offer as writing
from grpo_cuda import offers as table
from grpo_cuda.offers_attention import wide_values
from grpo_models.plugin import grpo_models

PUBLISHED = Path(__file__).parents[1] / "models" / "published"
HOOKS = sorted({contract.hook for contract in CONTRACTS.values()})
ENGINES = ("engine.rollout", "engine.train")
OURS = ("attention.", "norm.", "rope.", "mlp.", "linear.", "sample.", "loss.", "optim.", "memory.", "comm.")


def impls() -> list[Impl]:
    return [impl for hook in HOOKS for impl in table.offers(hook)]


def dense() -> list[str]:
    """Published models whose ops are all those of this file's tables."""
    names = []
    for path in sorted(PUBLISHED.glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["architectures"][0] in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
            names.append(path.stem)
    return names


def plan_of(name: str, *, features: frozenset[str] = frozenset(), **facts: Any) -> Plan:
    """On paper, for a GPU of these features besides what the probe tells without one."""
    config = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    families = {known: family for family in grpo_models() for known in family.architectures}
    arch = families[config["architectures"][0]].arch(config)
    catalogue = load()
    run = RunFacts(**{"train_dtype": "bfloat16", "rollout_dtype": "bfloat16", "world": 8, **facts})
    needs = [need for need in needs_of(arch, run) if need.op not in ENGINES]
    info = catalogue.devices["cuda"].probe().info
    info = replace(info, features=info.features | features)
    return resolve(needs, catalogue, info, on_paper=True)


def test_offers_are_for_cuda_and_claim_no_hardware() -> None:
    assert {impl.device for impl in impls()} == {"cuda"}
    assert {impl.proof for impl in impls()} <= {"", "audited", "simulated"}
    assert all(impl.load.startswith(("grpo_cuda.", "grpo_core.")) for impl in impls())
    names = [(impl.op, impl.name) for impl in impls()]
    assert len(names) == len(set(names))


def test_every_offer_that_differentiates_says_so() -> None:
    for impl in impls():
        assert impl.backward == CONTRACTS[impl.op].backward, impl


@pytest.mark.parametrize("name", dense())
def test_published_models_are_served_without_a_fallback(name: str) -> None:
    plan = plan_of(name)
    for row in plan.choices:
        assert not row.fallback, row
        assert row.chosen or row.op == "attention.step", row
    assert any("flash-attn" in note and "not installed" in note for note in plan.notes)


def test_which_attention_serves_which_gpu() -> None:
    def serving(*features: str, **facts: Any) -> tuple[str, ...]:
        plan = plan_of(dense()[0], features=frozenset(features), **facts)
        ops = ("attention.varlen", "attention.cache", "attention.prefill", "attention.decode")
        return tuple(str(plan.choice(op).chosen) for op in ops)

    best = ("cuda:flash_attn", "cuda:paged", "cuda:flash_attn", "cuda:flash_attn")
    assert serving() == serving("sm_80") == serving("sm_90") == best
    assert serving("sm_75") == ("cuda:sdpa", "cuda:paged", "cuda:paged", "cuda:paged")
    wide = serving("sm_90", train_dtype="float32", rollout_dtype="float32")
    assert wide == ("cuda:flex", "cuda:paged", "cuda:paged", "cuda:triton")


def test_refusals_tell_the_gpus_capability() -> None:
    plan = plan_of(dense()[0], features=frozenset({"sm_75"}))
    passed = {item.id: item.reason for item in plan.choice("attention.varlen").passed}
    assert "flash-attn needs compute capability 8.0" in passed["cuda:flash_attn"]
    assert "has 7.5" in passed["cuda:flash_attn"]
    plan = plan_of(dense()[0], features=frozenset({"sm_80"}))
    passed = {item.id: item.reason for item in plan.choice("attention.varlen").passed}
    assert (
        "cuDNN's attention of packed sequences needs compute capability 9.0"
        in (passed["cuda:transformer_engine"])
    )
    assert passed["cuda:varlen_attn"].startswith("fits")


def test_runs_that_must_repeat_pass_over_kernels_that_may_not() -> None:
    catalogue = load()
    info = catalogue.devices["cuda"].probe().info
    facts = {
        "dtype": "bfloat16",
        "head_dim": 64,
        "v_head_dim": 64,
        "num_key_value_groups": 4,
        "window": False,
    }
    need = Need(op="attention.varlen", facts=facts, backward=True, deterministic=True)
    passed = {
        item.id: item.reason
        for item in resolve([need], catalogue, info, on_paper=True).choice("attention.varlen").passed
    }
    assert passed["cuda:transformer_engine"] == "does not offer deterministic"
    wide = Need(op="attention.varlen", facts={**facts, "head_dim": 192, "v_head_dim": 128}, backward=True)
    plan = resolve([wide], catalogue, info, on_paper=True)
    assert plan.choice("attention.varlen").chosen == "cuda:sdpa"
    refused = {item.id: item.reason for item in plan.choice("attention.varlen").passed}
    assert refused["cuda:flash_attn"] == "values of 128 beside keys of 192: the kernel wants one size"


def test_reasons_of_the_table() -> None:
    new, old = (DeviceInfo(type="cuda", name="X", features=frozenset({one})) for one in ("sm_120", "sm_70"))
    unknown = DeviceInfo(type="cuda")
    need = Need(op="attention.varlen", facts={"head_dim": 64, "v_head_dim": 96})
    assert writing.capability(new) == 120 and writing.capability(unknown) is None
    assert writing.at_least(80)(new, need) is None and writing.at_least(80)(unknown, need) is None
    assert writing.exactly(frozenset({90, 100}), "it")(old, need) == (
        "it is built for compute capability 9.0 or 10.0, X has 7.0"
    )
    assert writing.exactly(frozenset({70}))(old, need) is None
    both = writing.every(writing.at_least(80, "it"), writing.same_head_dim)
    assert str(both(old, need)).startswith("it needs") and str(both(new, need)).startswith("values of 96")
    assert wide_values(new, need) == "values of 96 are wider than keys of 64"


def test_without_a_gpu_grpo_plan_plans_on_paper(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_recipe), "device=cuda", "train.dtype=bfloat16", "--why"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA GPU, not here: planned on paper" in text
    assert "x cpu:torch" in text and "for cpu, not cuda" in text
    assert "on paper: device cuda is not here" in text
    assert "0 fallback(s)" in text


def test_grpo_train_refuses_it_with_the_reasons(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_recipe), "device=cuda"]) == 2
    text = capsys.readouterr().err
    assert "device 'cuda' was asked for but is not here" in text and "(fix: " in text


def test_the_matrix_shows_both_vendors_on_a_machine_with_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--matrix"]) == 0
    text = capsys.readouterr().out
    head = text.splitlines()[0].split()
    assert {"cuda", "npu", "cpu"} <= set(head)
    assert "cuda:flash_attn" in text and "needs flash-attn" in text
    assert "cuda:transformer_engine" in text and "ascend:npu" in text
