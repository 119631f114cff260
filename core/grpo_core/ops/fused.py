"""Contracts of the smaller ops: norm, rotary, SwiGLU, linears, sampling, log-probs, optimizer.

T tokens, B sequences, C hidden size, V vocabulary, H/K query/kv heads, D head dim, R rotary dim / 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .common import Common


class RmsNorm(Protocol):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019). Differentiable."""

    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        *,
        eps: float,
        residual: Tensor | None,
        zero_centered: bool,
    ) -> Any:
        """y = x / sqrt(mean(x^2) + eps) * w in float32, cast to x's dtype before the product with w.

        `zero_centered` uses 1 + w. With `residual` the input is x + residual (in x's dtype) and the
        result is the pair (y, x + residual); without it, y alone. Neither input is changed.
        """
        ...


class RopeApply(Protocol):
    """Rotary position embedding of queries and keys (Su et al. 2021). Differentiable in q and k."""

    def __call__(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        *,
        interleaved: bool,
        common: Common | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotates the first 2R of D dimensions; the rest pass. cos/sin are float32.

        Pairs are (i, i + R) unless `interleaved`, then (2i, 2i + 1). Computed in float32, cast back. The
        layers of a pass give the same cos and sin with the same `common` (see `attention`), where an offer
        keeps what it makes of them.
        """
        ...


class SwiGLU(Protocol):
    """SiLU(gate) * up (Shazeer 2020). Differentiable."""

    def __call__(self, gate_up: Tensor) -> Tensor:
        """gate_up [..., 2F] holds gate, then up; returns [..., F]."""
        ...


class DenseLinear(Protocol):
    """A linear layer for training. Differentiable in x, weight and bias."""

    def __call__(
        self,
        x_TK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        *,
        main_grad_NK: Tensor | None,
    ) -> Tensor:
        """Returns x W^T + b, [T, N], in x's dtype.

        Where `main_grad_NK` (float32) is given, backward adds the gradient of the weight to it and gives
        autograd none for the weight (Megatron-core's gradient_accumulation_fusion), so that it is never
        rounded to the compute dtype.
        """
        ...


class PackedLinear(Protocol):
    """A linear layer for inference whose weight may be kept in the device's own layout."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None: ...

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Returns x W^T + b, [T, N]."""
        ...

    def update(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        """Take new values of the same shape and dtype, in place: at most one copy of the weight is kept."""
        ...

    def nbytes(self) -> int:
        """Bytes held beyond the tensors given to the constructor."""
        ...


class SampleToken(Protocol):
    """Draw one token a row by inverting the cumulative distribution at `u`."""

    def __call__(
        self,
        logits_BV: Tensor,
        u_B: Tensor,
        *,
        temperature_B: Tensor,
        top_k_B: Tensor | None,
        top_p_B: Tensor | None,
        min_p_B: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids_B int64, logprob_B under the sampling distribution, logprob1_B under temperature 1.

        u_B is float64 in [0, 1), float32 on a device without float64. Filters apply to the tempered
        distribution in the order top-k, top-p, min-p (as vLLM and transformers do); None switches one off
        for all rows, as do top_k 0, top_p 1 and min_p 0 for a row. Temperature 0 is greedy: the lowest id
        among the largest logits, log-prob 0 under the sampling distribution. Log-probs are float32. A row
        with a NaN logit raises `FloatingPointError`.
        """
        ...


class LogProb(Protocol):
    """Log-probability of labels and entropy, from hidden states; never a [T, V] tensor."""

    def __call__(
        self,
        hidden_TC: Tensor,
        lm_head_VC: Tensor,
        labels_T: Tensor,
        *,
        temperature: float,
        group: Any,
        main_grad_VC: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (logprob_T, entropy_T) in float32, of softmax(hidden lm_head^T / temperature).

        Differentiable in hidden and lm_head through both results. `group` is a tensor-parallel group
        over the vocabulary, or None. `main_grad_VC` (float32) takes the head's gradient, as
        `DenseLinear` says.
        """
        ...


class AdamW(Protocol):
    """One AdamW step with decoupled weight decay (Loshchilov and Hutter 2019), in place."""

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        *,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decays: Sequence[float],
        grad_scale: float,
        copies: Sequence[Tensor | None],
    ) -> None:
        """params, grads and moments are float32; each gradient is multiplied by `grad_scale` first, in place
        where an offer likes: what is in `grads` afterwards is of no use.

        `step` counts from 1. copies[i], where given, receives params[i] in its own dtype. Equals
        `torch.optim.AdamW` within float32 rounding.
        """
        ...
