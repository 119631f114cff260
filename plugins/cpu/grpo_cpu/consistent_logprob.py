"""loss.logprob and sample.token that give the same log-prob of a token, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.errors import PlanError
from grpo_core.ops.reference.fused import sample_token as reference_sample
from grpo_core.ops.reference.rowwise import row_sum

from .consistent import ROWS, borrowed, product
from .logprob import logprob as gradient


def logprob(
    hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, *, temperature: float, group: Any,
    main_grad_VC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.LogProb`; logits are rounded to the hidden states' dtype, as in the rollout.

    Raises ValueError for a temperature that is not above 0, IndexError for a label outside of the vocabulary,
    PlanError for a group of several ranks.
    """
    if not temperature > 0:
        raise ValueError(f"log-probs need a temperature above 0, not {temperature}")
    if group is not None and group.size > 1:
        raise PlanError(
            f"log-probs over a vocabulary split between {group.size} ranks",
            why="loss.logprob of cpu:consistent takes the whole vocabulary",
            fix="set consistent: false",
        )
    if bool(((labels_T < 0) | (labels_T >= lm_head_VC.shape[0])).any()):
        raise IndexError(f"a label lies outside of the vocabulary of {lm_head_VC.shape[0]}")

    def exact(hidden_TC: Tensor, lm_head_VC: Tensor) -> tuple[Tensor, Tensor]:
        heat_11 = torch.full((1, 1), temperature, dtype=torch.float32)
        parts = [
            of_logits(product(hidden_TC[at], lm_head_VC), labels_T[at].long(), heat_11)
            for at in (slice(start, start + ROWS) for start in range(0, hidden_TC.shape[0], ROWS))
        ]
        if not parts:
            return hidden_TC.new_empty(0, dtype=torch.float32), hidden_TC.new_empty(0, dtype=torch.float32)
        return torch.cat([one for one, _ in parts]), torch.cat([two for _, two in parts])

    def smooth(hidden_TC: Tensor, lm_head_VC: Tensor) -> tuple[Tensor, Tensor]:
        return gradient(
            hidden_TC, lm_head_VC, labels_T, temperature=temperature, group=group, main_grad_VC=main_grad_VC
        )

    results = borrowed(exact, smooth, hidden_TC, lm_head_VC)
    assert isinstance(results, tuple)
    return results[0], results[1]


def of_logits(logits_RV: Tensor, ids_R: Tensor, heat_R1: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob of ids, entropy) of softmax(logits / heat), float32 [R]; each row alone."""
    z_RV = logits_RV.float() / heat_R1
    z_RV = z_RV - z_RV.amax(-1, keepdim=True)
    p_RV = torch.exp(z_RV)
    total_R = row_sum(p_RV)
    log_R = torch.log(total_R)
    entropy_R = log_R - row_sum(p_RV * z_RV.clamp_min(torch.finfo(torch.float32).min)) / total_R
    return z_RV.gather(1, ids_R[:, None])[:, 0] - log_R, entropy_R


@torch.no_grad()
def sample_token(
    logits_BV: Tensor, u_B: Tensor, *, temperature_B: Tensor, top_k_B: Tensor | None,
    top_p_B: Tensor | None, min_p_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.SampleToken`; draws as the reference does. Without filters the log-probs are
    those of `logprob`."""
    ids_B, filtered_B, _ = reference_sample(
        logits_BV, u_B, temperature_B=temperature_B, top_k_B=top_k_B, top_p_B=top_p_B, min_p_B=min_p_B
    )
    other_B = temperature_B == 0
    for value_B, off in ((top_k_B, 0), (top_p_B, 1), (min_p_B, 0)):
        if value_B is not None:
            other_B = other_B | (value_B != off)
    heat_B1 = torch.where(temperature_B == 0, 1.0, temperature_B.float())[:, None]
    logprob_B, _ = of_logits(logits_BV, ids_B, heat_B1)
    logprob1_B, _ = of_logits(logits_BV, ids_B, torch.ones_like(heat_B1))
    return ids_B, torch.where(other_B, filtered_B, logprob_B), logprob1_B
