"""How each op that can be batch-invariant is asked, without the ones over caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .alone import ROWS, SEQUENCES, Sequenced
from .facts import Facts
from .question import Tensors, cumulative, normal

K_HEADS = 2
INPUTS, OUTPUTS = 320, 96
Drawer = Callable[..., dict[str, Tensor]]


def _size(facts: Facts, name: str) -> int:
    return int(facts[name])


def _norm(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    plain = parts[-1](x["x"], x["w"], eps=1e-5, residual=None, zero_centered=bool(facts["zero_centered"]))
    both = parts[-1](x["x"], x["w"], eps=1e-5, residual=x["r"], zero_centered=bool(facts["zero_centered"]))
    return plain, *both


def _rope_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    D, R = _size(facts, "head_dim"), _size(facts, "rotary_dim") // 2
    angles = 6 * torch.rand(T, R, generator=generator)
    return {
        "q": normal(generator, T, 4, D, dtype=dtype), "k": normal(generator, T, K_HEADS, D, dtype=dtype),
        "cos": angles.cos(), "sin": angles.sin(),
    }  # fmt: skip


def _rope(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    turned: tuple[Tensor, Tensor] = parts[-1](
        x["q"], x["k"], x["cos"], x["sin"], interleaved=bool(facts["interleaved"])
    )
    return turned


def _linear_weights(facts: Facts, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "weight": normal(generator, OUTPUTS, INPUTS, dtype=dtype, scale=INPUTS**-0.5),
        "bias": normal(generator, OUTPUTS, dtype=dtype),
    }


def _dense(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    return (parts[-1](x["x"], x["weight"], x["bias"], main_grad_NK=None),)


def _packed(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    return (parts[-1](x["weight"], x["bias"])(x["x"]),)


def _logprob_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    V = _size(facts, "vocab_size")
    return {
        "hidden": normal(generator, T, _size(facts, "hidden_size"), dtype=dtype),
        "labels": torch.randint(0, V, (T,), generator=generator),
    }


def _head(facts: Facts, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    C = _size(facts, "hidden_size")
    return {"head": normal(generator, _size(facts, "vocab_size"), C, dtype=dtype, scale=2 * C**-0.5)}


def _logprob(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    found: tuple[Tensor, Tensor] = parts[-1](x["hidden"], x["head"], x["labels"], temperature=0.8, group=None)
    return found


def _sample_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "logits": normal(generator, T, _size(facts, "vocab_size"), dtype=dtype, scale=2.0),
        "u": torch.rand(T, generator=generator, dtype=torch.float64),
        "temperature": 0.5 + torch.rand(T, generator=generator),
    }


def _sample(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    u = x["u"] if x["u"].device.type == "cpu" or facts.get("float64", True) else x["u"].float()
    found: tuple[Tensor, ...] = parts[-1](
        x["logits"], u, temperature_B=x["temperature"], top_k_B=None, top_p_B=None, min_p_B=None
    )
    return found


def _projected(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    D, H = _size(facts, "head_dim"), K_HEADS * _size(facts, "num_key_value_groups")
    return {
        "q": normal(generator, T, H, D, dtype=dtype),
        "k": normal(generator, T, K_HEADS, D, dtype=dtype),
        "v": normal(generator, T, K_HEADS, _size(facts, "v_head_dim"), dtype=dtype),
    }


def _varlen(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    return (
        parts[-1](
            x["q"], x["k"], x["v"], cu_seqlens=cumulative(lengths).to(x["q"].device),
            max_seqlen=max(lengths), scale=_size(facts, "head_dim") ** -0.5, causal=True, window=None,
        ),
    )  # fmt: skip


def _families(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    """Sequences of four tokens and more are a prompt with two completions."""
    segments: list[int] = []
    parents: list[int] = []
    for length in lengths:
        prompt, rest = (length // 2, length - length // 2) if length > 3 else (length, 0)
        root = len(segments)
        segments.append(prompt)
        parents.append(-1)
        if rest:
            segments += [rest // 2, rest - rest // 2]
            parents += [root, root]
    device = x["q"].device
    return (
        parts[-1](
            x["q"], x["k"], x["v"], cu_seqlens=cumulative(segments).to(device),
            parents=torch.tensor(parents, dtype=torch.int32, device=device), max_seqlen=max(segments),
            scale=_size(facts, "head_dim") ** -0.5, window=None,
        ),
    )  # fmt: skip


def _latents(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    H = _size(facts, "num_attention_heads")
    return {
        "q_nope": normal(generator, T, H, _size(facts, "qk_nope_head_dim"), dtype=dtype),
        "q_rope": normal(generator, T, H, _size(facts, "qk_rope_head_dim"), dtype=dtype),
        "latent": normal(generator, T, _size(facts, "kv_lora_rank"), dtype=dtype),
        "k_rope": normal(generator, T, _size(facts, "qk_rope_head_dim"), dtype=dtype),
    }


def latent_weight(facts: Facts, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """w_uk and w_uv of each head, one below the other."""
    L = _size(facts, "kv_lora_rank")
    rows = _size(facts, "qk_nope_head_dim") + _size(facts, "v_head_dim")
    H = _size(facts, "num_attention_heads")
    return {"weight": normal(generator, H, rows, L, dtype=dtype, scale=L**-0.5)}


def _mla(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    N, E = _size(facts, "qk_nope_head_dim"), _size(facts, "v_head_dim")
    w_uk, w_uv = torch.split(x["weight"], [N, E], 1)
    return (
        parts[-1](
            x["q_nope"], x["q_rope"], x["latent"], x["k_rope"], w_uk, w_uv, parents=None,
            cu_seqlens=cumulative(lengths).to(w_uk.device), max_seqlen=max(lengths),
            scale=(N + _size(facts, "qk_rope_head_dim")) ** -0.5,
        ),
    )  # fmt: skip


def _delta_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    D, E = _size(facts, "key_head_dim"), _size(facts, "value_head_dim")
    K = 2 * _size(facts, "num_value_groups")
    return {
        "q": normalize(normal(generator, T, 2, D), dim=-1).to(dtype),
        "k": normalize(normal(generator, T, 2, D), dim=-1).to(dtype),
        "v": normal(generator, T, K, E, dtype=dtype),
        "g": -torch.rand(T, K, generator=generator),
        "beta": torch.rand(T, K, generator=generator),
    }


def _delta_states(facts: Facts, dtype: torch.dtype, S: int, generator: torch.Generator) -> dict[str, Tensor]:
    D, E = _size(facts, "key_head_dim"), _size(facts, "value_head_dim")
    return {"state": normal(generator, S, 2 * _size(facts, "num_value_groups"), D, E)}


def _chunk(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    o_TKE, last = parts[-1](
        x["q"], x["k"], x["v"], x["g"], x["beta"], cu_seqlens=cumulative(lengths).to(x["q"].device),
        scale=0.3, initial_state_SKDE=x["state"], final_state=True,
    )  # fmt: skip
    return o_TKE, last


def _delta_step(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    slots = torch.arange(len(lengths), device=x["q"].device)
    o_BKE = parts[-1](
        x["q"], x["k"], x["v"], x["g"], x["beta"], state_NKDE=x["state"], slots=slots, scale=0.3
    )
    return o_BKE, x["state"]


CHANNELS = 40


def _conv_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": normal(generator, T, CHANNELS, dtype=dtype)}


def _conv_states(facts: Facts, dtype: torch.dtype, S: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"state": normal(generator, S, CHANNELS, _size(facts, "conv_kernel") - 1, dtype=dtype)}


def _conv_weight(facts: Facts, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return {"w": normal(generator, CHANNELS, _size(facts, "conv_kernel"), dtype=dtype)}


def _conv(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    y_TC, last = parts[-1](
        x["x"], x["w"], cu_seqlens=cumulative(lengths).to(x["x"].device), initial_state_SCW=x["state"],
        final_state=True,
    )  # fmt: skip
    return y_TC, last


def _conv_step(parts: Sequence[Any], x: Tensors, lengths: Sequence[int], facts: Facts) -> Sequence[Tensor]:
    slots = torch.arange(len(lengths), device=x["x"].device)
    y_BC = parts[-1](x["x"], x["w"], state_NCW=x["state"], slots=slots)
    return y_BC, x["state"]


def _rows_of(name: str, size: str, times: int = 1) -> Drawer:
    def rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
        width = times * int(facts.get(size, INPUTS))
        return {name: normal(generator, T, width, dtype=dtype)}

    return rows


def _norm_rows(facts: Facts, dtype: torch.dtype, T: int, generator: torch.Generator) -> dict[str, Tensor]:
    C = _size(facts, "hidden_size")
    return {"x": normal(generator, T, C, dtype=dtype), "r": normal(generator, T, C, dtype=dtype)}


def _norm_weight(facts: Facts, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    return {"w": normal(generator, _size(facts, "hidden_size"), dtype=dtype)}


KINDS: Mapping[str, Sequenced] = {
    "norm.rms": Sequenced(lengths=ROWS, rows=_norm_rows, shared=_norm_weight, call=_norm),
    "rope.apply": Sequenced(lengths=ROWS, rows=_rope_rows, call=_rope),
    "mlp.swiglu": Sequenced(
        lengths=ROWS, rows=_rows_of("gate_up", "intermediate_size", 2),
        call=lambda parts, x, lengths, facts: (parts[-1](x["gate_up"]),),
    ),
    "linear.dense": Sequenced(lengths=ROWS, rows=_rows_of("x", ""), shared=_linear_weights, call=_dense),
    "linear.packed": Sequenced(lengths=ROWS, rows=_rows_of("x", ""), shared=_linear_weights, call=_packed),
    "loss.logprob": Sequenced(lengths=ROWS, rows=_logprob_rows, shared=_head, call=_logprob),
    "sample.token": Sequenced(lengths=ROWS, rows=_sample_rows, call=_sample),
    "attention.varlen": Sequenced(lengths=SEQUENCES, rows=_projected, call=_varlen),
    "attention.shared_prefix": Sequenced(lengths=SEQUENCES, rows=_projected, call=_families),
    "mla.varlen": Sequenced(lengths=SEQUENCES, rows=_latents, shared=latent_weight, call=_mla),
    "gated_delta.chunk": Sequenced(
        lengths=SEQUENCES, rows=_delta_rows, states=_delta_states, call=_chunk, cuts={"state": "1"}
    ),
    "gated_delta.step": Sequenced(
        lengths=ROWS[:19], rows=_delta_rows, states=_delta_states, call=_delta_step
    ),
    "short_conv.varlen": Sequenced(
        lengths=SEQUENCES, rows=_conv_rows, states=_conv_states, shared=_conv_weight, call=_conv,
        cuts={"state": "1"},
    ),
    "short_conv.step": Sequenced(
        lengths=ROWS, rows=_conv_rows, states=_conv_states, shared=_conv_weight, call=_conv_step
    ),
}  # fmt: skip
