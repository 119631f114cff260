"""sample.token of a device without float64: the draw is made on the host, exactly."""

from __future__ import annotations

from torch import Tensor

from grpo_core.ops.reference.fused import sample_token as sample_on_host


def sample_token(
    logits_BV: Tensor,
    u_B: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor | None,
    top_p_B: Tensor | None,
    min_p_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `grpo_core.ops.fused.SampleToken`."""

    def host(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.cpu()

    ids_B, logprob_B, logprob1_B = sample_on_host(
        logits_BV.cpu(),
        u_B.cpu(),
        temperature_B=temperature_B.cpu(),
        top_k_B=host(top_k_B),
        top_p_B=host(top_p_B),
        min_p_B=host(min_p_B),
    )
    there = logits_BV.device
    return ids_B.to(there), logprob_B.to(there), logprob1_B.to(there)
