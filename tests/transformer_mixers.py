"""Mixers of transformers on random weights, to hold the ops to."""

from __future__ import annotations

from collections.abc import Callable

import delta_checks
import op_oracles as oracle
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

FLOAT32_PAIR = 4.0
"""Times the tolerance of one float32 computation: here both sides are."""


def check_delta(impl: delta_checks.Chunk, recurrent: bool) -> None:
    """Both functions of transformers, which compute in float32 and scale by D^-1/2: two sequences of 100."""
    q, k, v, g, beta, state = delta_checks.inputs(200, 2, torch.float32, decay=1.0)
    theirs = torch_recurrent_gated_delta_rule if recurrent else torch_chunk_gated_delta_rule

    def run(*x: Tensor) -> tuple[Tensor, Tensor | None]:
        return impl(
            *x[:5], cu_seqlens=delta_checks.cumulative([100, 100]), scale=q.shape[-1] ** -0.5,
            initial_state_SKDE=x[5], final_state=True,
        )  # fmt: skip

    def expected(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, last = theirs(*(y.view(2, 100, *y.shape[1:]) for y in x[:5]), initial_state=x[5],
                         output_final_state=True)  # fmt: skip
        return o.flatten(0, 1), last

    given = [q, k, v, g, beta, state]
    oracle.assert_close(
        oracle.with_grads(run, given), oracle.with_grads(expected, given), torch.float32, FLOAT32_PAIR
    )


def check_delta_step(impl: Callable[..., Tensor]) -> None:
    q, k, v, g, beta, _ = delta_checks.inputs(3, 1, torch.float32, decay=1.0)
    states = torch.randn(5, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([3, 0, 4])
    wanted, last = torch_recurrent_gated_delta_rule(
        *(x[:, None] for x in (q, k, v, g, beta)), initial_state=states[slots], output_final_state=True
    )
    got = impl(q, k, v, g, beta, state_NKDE=states, slots=slots, scale=q.shape[-1] ** -0.5)
    oracle.assert_close([got, states[slots]], [wanted[:, 0], last], torch.float32, FLOAT32_PAIR)


def deepseek() -> DeepseekV3Attention:
    """A small attention layer in float64, without query compression."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=24,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, attn_implementation="eager",
    )  # fmt: skip
    return DeepseekV3Attention(config, 0).double()


def projections(module: DeepseekV3Attention, x_TC: Tensor, angle_TR: Tensor) -> list[Tensor]:
    """The arguments of `mla.varlen` from the layer's own weights: rotation by complex numbers, as pairs."""
    config = module.config
    q = module.q_proj(x_TC).view(len(x_TC), config.num_attention_heads, -1)
    q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
    latent, k_rope = module.kv_a_proj_with_mqa(x_TC).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    both = module.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    return [
        q_nope, oracle.rotate(q_rope, angle_TR, interleaved=True), module.kv_a_layernorm(latent),
        oracle.rotate(k_rope[:, None], angle_TR, interleaved=True)[:, 0],
        *both.split([config.qk_nope_head_dim, config.v_head_dim], 1),
    ]  # fmt: skip


def attention_of(module: DeepseekV3Attention, x_TC: Tensor, angle_TR: Tensor) -> Tensor:
    """What the layer itself gives for one causal sequence."""
    T = len(x_TC)
    angle = torch.cat([angle_TR, angle_TR], -1)[None]
    mask = torch.zeros(T, T, dtype=torch.float64).masked_fill_(
        torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf
    )
    return module(x_TC[None], (angle.cos(), angle.sin()), mask[None, None])[0][0]


def check_deepseek(varlen: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The layer's output and the gradient of its input, for two packed sequences.

    Its softmax and norm compute in float32 whatever its dtype.
    """
    module = deepseek()
    angle = torch.linspace(-3, 3, 13 * 8, dtype=torch.float64).view(13, 8)
    x = torch.randn(13, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        given = [y.to(dtype) for y in projections(module, x, angle)]
        o = varlen(
            *given, cu_seqlens=delta_checks.cumulative([9, 4]), parents=None, max_seqlen=9,
            scale=module.scaling,
        )  # fmt: skip
        return module.o_proj(o.double().flatten(1))

    def expected(x: Tensor) -> Tensor:
        return torch.cat([attention_of(module, x[:9], angle[:9]), attention_of(module, x[9:], angle[9:])])

    oracle.assert_close(oracle.with_grads(run, [x]), oracle.with_grads(expected, [x]), dtype)
