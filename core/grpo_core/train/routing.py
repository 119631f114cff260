"""Routing replay: which experts an update uses, and how far they are from the rollout's.

In a mixture of experts, rollout and trainer may send a near tie to different experts, so that the update is
taken at another function than the tokens were drawn from. Replaying the rollout's experts (R3; Ma et al.
2025, arXiv 2510.11370) or those of the old log-probs (R2; "routing replay" of Zheng et al. 2025, arXiv
2507.18071) fixes the choice; the routers' weights still come from the current logits, and gradients flow
into them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import GrpoError
from ..model.arch import MoE

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.arch import Arch
    from ..types import Batch

CHANGED, FREE_CHANGED = "mismatch/routing_changed", "mismatch/routing_free_changed"
"""The metrics: of the experts that the update uses, and under replay of those it would use without."""
KNOWN = "routing_known"
"""Name of the sum that both are divided by."""


def expert_sizes(arch: Arch) -> tuple[int, int] | None:
    """(layers with experts, experts of a token), or None for a dense model."""
    sizes = [layer.ffn.top_k for layer in arch.layers if isinstance(layer.ffn, MoE)]
    return (len(sizes), sizes[0]) if sizes else None


def replayed(batch: Batch, replay: str, sizes: tuple[int, int] | None) -> Tensor | None:
    """The experts that the policy must use, int16 [T, M, k], or None to route freely.

    Raises `GrpoError` where the rollout's experts are wanted and the engine has recorded none.
    """
    if replay == "off" or sizes is None or batch.labels_L.shape[0] == 0:
        return None
    if replay == "R2":
        return batch.old_experts_TMk
    found = batch.routed_experts_TMk
    if found is None:
        raise GrpoError(
            "train.routing_replay R3 has nothing to replay",
            why="the rollout engine did not record which experts it used",
            fix="use an engine that records them (native does), or set train.routing_replay to R2 or off",
        )
    if tuple(found.shape[1:]) != sizes:
        raise GrpoError(
            f"the rollout recorded {found.shape[1]} layers of {found.shape[2]} experts a token",
            why=f"the trainer's model has {sizes[0]} layers of {sizes[1]}",
            fix="let rollout and trainer run the same model, or set train.routing_replay to R2 or off",
        )
    return found


def blank(batch: Batch, sizes: tuple[int, int]) -> Tensor:
    """Where a pass over the batch records its experts: int16 [T, M, k], -1 until it does."""
    tokens_T = batch.tokens_T
    return torch.full((tokens_T.shape[0], *sizes), -1, dtype=torch.int16, device=tokens_T.device)


def changed(batch: Batch, used_TMk: Tensor, free_TMk: Tensor | None) -> dict[str, Tensor]:
    """Sums over the pairs of a loss token and a layer: those whose experts differ as a set from the
    rollout's, and those whose experts the rollout recorded; with `free_TMk` the former also of these.

    A loss token counts where it is predicted, so that the sums do not depend on how often a prompt is
    computed.
    """
    assert batch.routed_experts_TMk is not None
    theirs_LMk = batch.routed_experts_TMk.index_select(0, batch.predict_L).sort(-1).values
    known_LM = (theirs_LMk >= 0).all(-1)

    def differ(ours_TMk: Tensor) -> Tensor:
        ours_LMk = ours_TMk.index_select(0, batch.predict_L).sort(-1).values
        return ((theirs_LMk != ours_LMk).any(-1) & known_LM).sum()

    sums = {CHANGED: differ(used_TMk), KNOWN: known_LM.sum()}
    return sums if free_TMk is None else {**sums, FREE_CHANGED: differ(free_TMk)}


def share_changed(means: dict[str, float]) -> dict[str, float]:
    """Metrics with the sums of `changed` replaced by their quotients, where there are any."""
    known = means.pop(KNOWN, 0.0)
    differ = {name: means.pop(name) for name in (CHANGED, FREE_CHANGED) if name in means}
    return {**means, **{name: value / known for name, value in differ.items()}} if known else means


def with_old_pass(batch: Batch, logprobs_L: Tensor, experts_TMk: Tensor | None) -> Batch:
    """The micro-batch with what the pass before the first update has found."""
    return replace(batch, old_logprobs_L=logprobs_L, old_experts_TMk=experts_TMk)
