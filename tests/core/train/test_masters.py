"""float32 masters kept as a bfloat16 weight and a 16-bit remainder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from train_helpers import loss_of, make_scored, packed, scored_of, weights_of

from grpo_core.train.masters import join, split
from grpo_core.train.parameters import FlatParameters, pieces
from grpo_core.train.trainer import NativeTrainer

Make = Callable[..., NativeTrainer]


def round_trip(masters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.empty(masters.shape, dtype=torch.bfloat16)
    remainders = torch.empty(masters.shape, dtype=torch.int16)
    split(masters.clone(), weights, remainders)
    back = torch.empty_like(masters)
    join(weights, remainders, back)
    return weights, back


@given(st.lists(st.floats(width=32, allow_nan=False, max_value=2.0**127, min_value=-(2.0**127)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_masters_come_back_to_the_bit(values: list[float]) -> None:
    masters = torch.tensor(values, dtype=torch.float32)
    weights, back = round_trip(masters)
    assert torch.equal(back.view(torch.int32), masters.view(torch.int32))
    ties = masters.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(weights[~ties], masters.bfloat16()[~ties])


def test_every_lower_half_comes_back_and_ties_go_away_from_zero() -> None:
    lower = torch.arange(1 << 16, dtype=torch.int32)
    for upper in (0x3F80, 0x3F81, 0x0000, 0x7F7E):
        for sign in (1.0, -1.0):
            masters = ((upper << 16) | lower).view(torch.float32) * sign
            weights, back = round_trip(masters)
            assert torch.equal(back.view(torch.int32), masters.view(torch.int32))
            # nearest: within half a step, and at a tie the larger of the two
            nearest = masters.bfloat16()
            different = weights != nearest
            assert different.sum() <= 1
            assert (weights[different].abs() > nearest[different].abs()).all()


def test_pieces_cover_the_buffer_once_and_never_mix_decays() -> None:
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 70))
    flat = FlatParameters(module, device=torch.device("cpu"), dtype=torch.float32)
    for size in (1, 33, 64, 10_000):
        covered = torch.zeros_like(flat.weights_P)
        for piece in pieces(flat.slots, size):
            assert 0 < piece.stop - piece.start <= size
            covered[piece.start : piece.stop] += 1 if piece.decays else 10
        for slot in flat.slots:
            assert (covered[slot.start : slot.stop] == (1 if slot.decays else 10)).all()
    assert {slot.name for slot in flat.slots if slot.decays} == {"0.weight", "2.weight"}
    assert all(slot.start % 64 == 0 for slot in flat.slots)


def test_bfloat16_masters_start_from_a_float32_checkpoint_exactly(hf_model: Any, trainer_of: Make) -> None:
    trainer = trainer_of(dtype="bfloat16")
    wanted = dict(trainer.setup.weight_map.export(weights_of(trainer)))
    for name, parameter in hf_model.named_parameters():
        assert torch.equal(wanted[name], parameter.detach())


def gain(trainer: NativeTrainer, *, masters: bool) -> float:
    """How much more likely 25 small steps make a completion of advantage 1; without masters if told."""
    batches = packed([scored_of(0, (3, 4, 5), (6, 7, 8, 9), advantage=1.0)])
    before = trainer.logprobs(batches, reference=False)[0].mean()
    for _ in range(25):
        trainer.step(batches, loss_of(trainer))
        if not masters:
            assert trainer.flat.remainder_P is not None
            trainer.flat.remainder_P.zero_()
    return float(trainer.logprobs(batches, reference=False)[0].mean() - before)


def test_bfloat16_learns_by_its_masters_where_bare_bfloat16_does_not(trainer_of: Make) -> None:
    # Weights have size 0.3, where bfloat16 is 1e-3 apart: a step of 1e-4 rounds away, 25 of them do not.
    settings_: dict[str, Any] = {"lr": 1e-4, "max_grad_norm": 0}
    exact = gain(trainer_of(dtype="float32", **settings_), masters=True)
    kept = gain(trainer_of(dtype="bfloat16", **settings_), masters=True)
    lost = gain(trainer_of(dtype="bfloat16", **settings_), masters=False)
    assert exact > 0.1
    assert kept > 0.7 * exact
    assert lost < 0.3 * exact


def test_bfloat16_step_follows_float32(trainer_of: Make) -> None:
    half, exact = trainer_of(dtype="bfloat16", lr=1e-3), trainer_of(dtype="float32", lr=1e-3)
    start = weights_of(exact)
    for trainer in (half, exact):
        trainer.step(packed(make_scored(), 25), loss_of(trainer))
    moves = [
        torch.cat([(weights_of(t)[name] - start[name]).reshape(-1) for name in start]) for t in (half, exact)
    ]
    # Adam's first step is lr * sign(g): bfloat16 gradients carry 8 bits, so only small ones change sign.
    agreement = torch.nn.functional.cosine_similarity(moves[0], moves[1], dim=0)
    assert agreement > 0.95
