"""Training mixtures of experts: frozen selection biases, routing replay, and its metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_helpers import mixture_trainer, recorded, write_mixture
from safetensors.torch import load_file
from train_helpers import loss_of, make_scored, packed, weights_of

from grpo_core.errors import GrpoError
from grpo_core.model.feedforward import Mixture
from grpo_core.train.routing import CHANGED, FREE_CHANGED

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {
        family: write_mixture(family, root / family) for family in ("qwen3_moe", "deepseek_v3", "qwen3_next")
    }


def exported(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.weights()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selection_bias_is_exported_in_float32_and_never_trained(
    folders: dict[str, Path], dtype: str, tmp_path: Path
) -> None:
    trainer = mixture_trainer(folders["deepseek_v3"], dtype=dtype, lr=0.1, weight_decay=0.5)
    before = exported(trainer)
    source = load_file(folders["deepseek_v3"] / "model.safetensors")
    assert before[BIAS].dtype == torch.float32
    assert before[BIAS].abs().max() > 0.1
    assert torch.equal(before[BIAS], source[BIAS])
    trainer.step(packed(make_scored()), loss_of(trainer))
    after = exported(trainer)
    assert torch.equal(after[BIAS], before[BIAS])
    assert not torch.equal(after["model.layers.1.mlp.gate.weight"], before["model.layers.1.mlp.gate.weight"])
    trainer.save(tmp_path / "state")
    other = mixture_trainer(folders["deepseek_v3"], dtype=dtype)
    other.policy.get_buffer("layers.1.mlp.router.bias").zero_()
    other.load(tmp_path / "state")
    assert all(torch.equal(tensor, after[name]) for name, tensor in other.weights())


def test_experts_decay_and_vectors_of_the_delta_net_do_not(folders: dict[str, Path]) -> None:
    slots = {slot.name: slot.decays for slot in mixture_trainer(folders["qwen3_next"]).flat.slots}
    assert slots["layers.0.mlp.experts.gate_up.weight"]
    assert slots["layers.0.mlp.router.weight"]
    for name in ("linear_attn.dt_bias", "linear_attn.A_log", "linear_attn.norm.weight", "attn_norm.weight"):
        assert not slots[f"layers.0.{name}"]


@pytest.mark.parametrize("replay", ["off", "R3"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_update_and_metric_do_not_depend_on_micro_batches_or_shared_prompts(
    folders: dict[str, Path], family: str, replay: str
) -> None:
    found = []
    for micro_tokens, share_prompt, recompute in (
        (1000, True, False), (12, True, True), (1000, False, False),
    ):  # fmt: skip
        # Far above any gradient, eps makes AdamW's first step lr / eps x gradient: the gradient itself.
        trainer = mixture_trainer(
            folders[family], routing_replay=replay, recompute=recompute, eps=1e6, lr=1e6, max_grad_norm=0
        )
        scored, before = recorded(trainer, moved=0.3), weights_of(trainer)
        batches = packed(scored, micro_tokens, share_prompt)
        metrics = trainer.step(batches, loss_of(trainer)).values
        change = {name: before[name] - weight for name, weight in weights_of(trainer).items()}
        found.append((len(batches), metrics, change))
    assert found[1][0] > 1
    _, metrics, change = found[0]
    assert metrics[CHANGED] > 0 or replay == "R3"
    largest = max(float(part.norm()) for part in change.values())
    for _, other, other_change in found[1:]:
        assert other[CHANGED] == pytest.approx(metrics[CHANGED])
        assert other.get(FREE_CHANGED) == pytest.approx(metrics.get(FREE_CHANGED))
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-4, abs=1e-6)
        for name, part in change.items():
            error = float((other_change[name] - part).norm())
            assert error / max(float(part.norm()), 1e-2 * largest) < 1e-3, name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_share_of_changed_experts_is_what_was_moved(folders: dict[str, Path], family: str) -> None:
    for replay, moved, low, high in (("off", 0.0, 0.0, 0.0), ("off", 1.0, 0.95, 1.0), ("off", 0.3, 0.1, 0.5),
                                     ("R3", 1.0, 0.0, 0.0)):  # fmt: skip
        trainer = mixture_trainer(folders[family], routing_replay=replay)
        metrics = trainer.step(packed(recorded(trainer, moved=moved)), loss_of(trainer)).values
        assert low <= metrics[CHANGED] <= high, (replay, moved)
    trainer = mixture_trainer(folders[family])
    assert CHANGED not in trainer.step(packed(make_scored()), loss_of(trainer)).values


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_replay_reports_what_it_spares(folders: dict[str, Path], family: str) -> None:
    """The share of records that were moved, although the update uses the records."""
    for moved, low, high in ((0.0, 0.0, 0.0), (1.0, 0.95, 1.0)):
        trainer = mixture_trainer(folders[family], routing_replay="R3")
        metrics = trainer.step(packed(recorded(trainer, moved=moved)), loss_of(trainer)).values
        assert metrics[CHANGED] == 0.0
        assert low <= metrics[FREE_CHANGED] <= high
    free = mixture_trainer(folders[family])
    assert FREE_CHANGED not in free.step(packed(recorded(free)), loss_of(free)).values


def test_free_choice_is_known_where_a_plan_binds_the_whole_layer(folders: dict[str, Path]) -> None:
    """Such a plan leaves moe.route out."""
    trainer = mixture_trainer(folders["deepseek_v3"], routing_replay="R3")
    batches = packed(recorded(trainer, moved=0.5))
    wanted = trainer.step(batches, loss_of(trainer)).values[FREE_CHANGED]
    whole = mixture_trainer(folders["deepseek_v3"], routing_replay="R3")
    for module in whole.policy.modules():
        if isinstance(module, Mixture):
            ops = module.backend.moe
            left_out = dict.fromkeys(("route", "dispatch", "experts", "combine"))
            module.backend = replace(module.backend, moe=replace(ops, **left_out, layer=whole_layer(ops)))
    assert 0.2 < wanted < 0.8
    assert whole.step(batches, loss_of(whole)).values[FREE_CHANGED] == pytest.approx(wanted)


def whole_layer(ops: Any) -> Any:
    """moe.layer made of the four parts."""

    def layer(
        x_TC: Any, logits_TX: Any, gate_up_XGC: Any, down_XCF: Any, *, group: Any, **settings: Any
    ) -> Any:
        weights_Tk, ids_Tk = ops.route(logits_TX, **settings)
        rows_RC, counts_X, record = ops.dispatch(x_TC, ids_Tk, num_experts=logits_TX.shape[1], group=group)
        return ops.combine(ops.experts(rows_RC, gate_up_XGC, down_XCF, counts_X), weights_Tk, record), ids_Tk

    return layer


def test_replay_of_the_rollout_changes_the_policys_logprobs_and_not_the_references(
    folders: dict[str, Path],
) -> None:
    free = mixture_trainer(folders["deepseek_v3"], algo={"kl_coef": 0.1})
    fixed = mixture_trainer(folders["deepseek_v3"], algo={"kl_coef": 0.1}, routing_replay="R3")
    batches = packed(recorded(free, moved=0.5))
    [wanted] = free.logprobs(batches, reference=False)
    [replayed] = fixed.logprobs(batches, reference=False)
    assert float((wanted - replayed).abs().max()) > 1e-2
    assert torch.equal(fixed.logprobs(batches, reference=True)[0], wanted)
    assert torch.equal(free.logprobs(batches, reference=True)[0], wanted)
    own = packed(recorded(free))
    torch.testing.assert_close(fixed.logprobs(own, reference=False)[0], wanted, rtol=0, atol=1e-5)


def test_replay_of_the_old_pass_keeps_its_experts_after_the_weights_have_moved(
    folders: dict[str, Path],
) -> None:
    shares = {}
    for replay in ("off", "R2", "R3"):
        trainer = mixture_trainer(folders["deepseek_v3"], routing_replay=replay, lr=0.3)
        batches = trainer.with_old(packed(recorded(trainer), micro_tokens=20))
        assert all((batch.old_experts_TMk is not None) == (replay == "R2") for batch in batches)
        assert all(batch.old_logprobs_L is not None for batch in batches)
        shares[replay] = [trainer.step(batches, loss_of(trainer)).values[CHANGED] for _ in range(2)]
    assert shares["off"][0] == 0.0 and shares["off"][1] > 0.1
    assert shares["R2"] == [0.0, 0.0]
    assert shares["R3"] == [0.0, 0.0]


def test_old_pass_gives_the_log_probs_of_the_policy(folders: dict[str, Path]) -> None:
    trainer = mixture_trainer(folders["qwen3_moe"], routing_replay="R2")
    batches = packed(recorded(trainer), micro_tokens=20)
    for batch, logprobs_L in zip(
        trainer.with_old(batches), trainer.logprobs(batches, reference=False), strict=True
    ):
        assert torch.equal(batch.old_logprobs_L, logprobs_L)
        assert batch.old_experts_TMk.dtype == torch.int16
        assert bool((batch.old_experts_TMk >= 0).all())


def test_replay_without_records_is_refused(folders: dict[str, Path]) -> None:
    trainer = mixture_trainer(folders["qwen3_moe"], routing_replay="R3")
    with pytest.raises(GrpoError, match="nothing to replay"):
        trainer.step(packed(make_scored()), loss_of(trainer))


def test_a_micro_batch_of_empty_completions_needs_no_records(folders: dict[str, Path]) -> None:
    trainer = mixture_trainer(folders["qwen3_moe"], routing_replay="R3")
    empty = [item for item in make_scored() if not item.completion.token_ids]
    assert empty
    [batch] = trainer.with_old(packed(empty))
    assert batch.old_logprobs_L is not None
    assert batch.old_logprobs_L.shape == (0,)


def test_replay_of_another_models_records_is_refused(folders: dict[str, Path]) -> None:
    records = recorded(mixture_trainer(folders["qwen3_moe"]))
    trainer = mixture_trainer(folders["deepseek_v3"], routing_replay="R3")
    with pytest.raises(GrpoError, match="2 layers of 2 experts"):
        trainer.step(packed(records), loss_of(trainer))


def test_gradients_reach_the_router_under_replay(folders: dict[str, Path]) -> None:
    for family, path in folders.items():
        trainer = mixture_trainer(path, routing_replay="R3", recompute=True)
        before = weights_of(trainer)
        trainer.step(packed(recorded(trainer, moved=0.5)), loss_of(trainer))
        after = weights_of(trainer)
        routers = [name for name in after if name.endswith("router.weight")]
        assert len(routers) >= 2, family
        assert all(not torch.equal(after[name], before[name]) for name in routers), family


def test_float64_routers_give_nearly_the_same_log_probs(folders: dict[str, Path]) -> None:
    single = mixture_trainer(folders["qwen3_next"])
    double = mixture_trainer(folders["qwen3_next"], router_dtype="float64")
    batches = packed(make_scored())
    torch.testing.assert_close(
        double.logprobs(batches, reference=False)[0], single.logprobs(batches, reference=False)[0],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
