"""Inputs of `bench_ops.py`: each op at the sizes of SmolLM2-135M, with the work that it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grpo_core.ops.attention import CacheSpec

H, K, D, C, F, V = 9, 3, 64, 576, 1536, 49152
BF16 = torch.bfloat16
Make = Callable[[Any, Any], Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one size. `make(function, cache class)` gives the call to time."""

    name: str
    op: str
    facts: dict[str, Any]
    make: Make
    flops: float = 0.0
    """Multiplications and additions of the products, where these are the bound."""
    bytes: float = 0.0
    """Bytes read and written once, where memory is the bound."""
    against: str = "core:reference"


HEADS = {"dtype": "bfloat16", "head_dim": D, "v_head_dim": D, "num_key_value_groups": H // K, "window": False}
PROMPTS, PROMPT, GROUP, OWN = 8, 50, 8, 32
"""Sequences of a decoding step: a prompt's samples, half way through 64 tokens."""


def cache_with_groups(cache_class: Any) -> tuple[Any, torch.Tensor]:
    """A filled layer and the slots of all samples."""
    room = OWN + 1
    spec = CacheSpec(
        num_layers=1, num_key_value_heads=K, head_dim=D, v_head_dim=D, dtype=BF16, device=torch.device("cpu"),
        max_slots=PROMPTS * (GROUP + 1), max_tokens=PROMPTS * (PROMPT + GROUP * room),
    )  # fmt: skip
    cache, slots = cache_class(spec), []
    for _ in range(PROMPTS):
        parent = cache.allocate(PROMPT)
        _fill(cache, parent, 0, PROMPT)
        for _ in range(GROUP):
            slots.append(cache.fork(parent, prefix=PROMPT, length=room))
            _fill(cache, slots[-1], PROMPT, room)
    return cache.layers[0], torch.tensor(slots)


def _fill(cache: Any, slot: int, start: int, count: int) -> None:
    tokens = torch.randn(count, K, D, dtype=BF16)
    where = torch.arange(start, start + count)
    cache.layers[0].write(tokens, tokens, slots_T=torch.full((count,), slot), positions_T=where)


def decode(function: Any, cache_class: Any) -> Callable[[], object]:
    layer, slots = cache_with_groups(cache_class)
    q, lengths = torch.randn(len(slots), H, D, dtype=BF16), torch.full_like(slots, PROMPT + OWN)
    return lambda: function(q, layer, seqlens_k=lengths, slots=slots, scale=D**-0.5, window=None)


def step(function: Any, cache_class: Any) -> Callable[[], object]:
    layer, slots = cache_with_groups(cache_class)
    qkv, angles = torch.randn(len(slots), (H + 2 * K) * D, dtype=BF16), torch.randn(len(slots), D // 2)
    cos, sin, positions = angles.cos(), angles.sin(), torch.full_like(slots, PROMPT + OWN)
    return lambda: function(
        qkv, layer, cos_BR=cos, sin_BR=sin, positions=positions, slots=slots, num_heads=H, scale=D**-0.5,
        window=None, interleaved=False, q_norm=None, k_norm=None, eps=1e-5,
    )  # fmt: skip


def prefill(function: Any, cache_class: Any) -> Callable[[], object]:
    layer, slots = cache_with_groups(cache_class)
    tokens, slots = PROMPT + OWN, slots[::GROUP]
    ends = torch.arange(0, PROMPTS * tokens + 1, tokens, dtype=torch.int32)
    q, lengths = torch.randn(PROMPTS * tokens, H, D, dtype=BF16), torch.full_like(slots, tokens)
    return lambda: function(
        q, layer, cu_seqlens_q=ends, seqlens_k=lengths, slots=slots, scale=D**-0.5, window=None
    )


def packed(shared: bool, backward: bool) -> Make:
    """Attention over PROMPTS groups of samples with 64 tokens; unshared, each sample brings its prompt."""
    own = 64 if shared else PROMPT + 64
    lengths = ([PROMPT] + [own] * GROUP if shared else [own] * GROUP) * PROMPTS
    parents = [-1 if i % (GROUP + 1) == 0 else i // (GROUP + 1) * (GROUP + 1) for i in range(len(lengths))]

    def make(function: Any, cache_class: Any) -> Callable[[], object]:
        fused = torch.randn(sum(lengths), (H + 2 * K) * D, dtype=BF16)
        parts = fused.split([H * D, K * D, K * D], 1)
        q, k, v = (x.unflatten(1, (-1, D)).requires_grad_() for x in parts)
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        tree: Mapping[str, Any] = {"parents": torch.tensor(parents).int()} if shared else {"causal": True}

        def forward() -> Any:
            return function(
                q, k, v, cu_seqlens=ends, max_seqlen=max(lengths), scale=D**-0.5, window=None, **tree
            )

        if not backward:
            return torch.no_grad()(forward)
        return differentiated(forward)

    return make


def differentiated(forward: Callable[[], Any]) -> Callable[[], object]:
    """Only the backward pass, of the first result."""
    out = forward()
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn_like(out)
    return lambda: torch.autograd.backward(out, grad, retain_graph=True)


def pairs(shared: bool) -> float:
    """Query-key pairs of `packed`, all heads."""
    total, sample = PROMPT + 64, PROMPT * 64 + 64 * 65 / 2
    each = PROMPT * (PROMPT + 1) / 2 + GROUP * sample if shared else GROUP * total * (total + 1) / 2
    return PROMPTS * H * each


def norm(rows: int, backward: bool) -> Make:
    def make(function: Any, cache_class: Any) -> Callable[[], object]:
        x, r, w = (torch.randn(*s, dtype=BF16, requires_grad=backward) for s in ((rows, C), (rows, C), (C,)))

        def forward() -> Any:
            return function(x, w, eps=1e-5, residual=r, zero_centered=False)

        return differentiated(forward) if backward else forward

    return make


def swiglu(rows: int, backward: bool) -> Make:
    def make(function: Any, cache_class: Any) -> Callable[[], object]:
        x = torch.randn(rows, 2 * F, dtype=BF16, requires_grad=backward)
        return differentiated(lambda: function(x)) if backward else lambda: function(x)

    return make


def rope(function: Any, cache_class: Any) -> Callable[[], object]:
    fused, angles = torch.randn(4096, H + 2 * K, D, dtype=BF16), torch.randn(4096, D // 2)
    q, k, cos, sin = fused[:, :H], fused[:, H : H + K], angles.cos(), angles.sin()
    return lambda: function(q, k, cos, sin, interleaved=False)


def sample(top_p: float | None) -> Make:
    def make(function: Any, cache_class: Any) -> Callable[[], object]:
        # About as peaked as a language model: a few likely tokens over a broad floor.
        logits = torch.randn(64, V).mul_(2).add_(torch.rand(64, V).pow_(200), alpha=20).to(BF16)
        u, temperature = torch.rand(64, dtype=torch.float64), torch.ones(64)
        p = None if top_p is None else torch.full((64,), top_p)
        return lambda: function(logits, u, temperature_B=temperature, top_k_B=None, top_p_B=p, min_p_B=None)

    return make


def linear(function: Any, cache_class: Any) -> Callable[[], object]:
    layer, x = function(torch.randn(2 * F, C, dtype=BF16), None), torch.randn(64, C, dtype=BF16)
    return lambda: layer(x)


def logprob(backward: bool) -> Make:
    def make(function: Any, cache_class: Any) -> Callable[[], object]:
        hidden = torch.randn(1024, C, dtype=BF16, requires_grad=True)
        head = (torch.randn(V, C) * 0.05).to(BF16).requires_grad_()
        labels = torch.randint(0, V, (1024,))

        def forward() -> Any:
            return function(hidden, head, labels, temperature=1.0, group=None)

        return differentiated(forward) if backward else torch.no_grad()(forward)

    return make


def adamw(function: Any, cache_class: Any) -> Callable[[], object]:
    params, grads, first, second = ([torch.rand(1 << 20) for _ in range(8)] for _ in range(4))
    copies = [x.to(BF16) for x in params]
    return lambda: function(
        params, grads, first, second, step=3, lr=1e-6, beta1=0.9, beta2=0.999, eps=1e-8,
        weight_decays=[0.0] * 8, grad_scale=1.0, copies=copies,
    )  # fmt: skip


_CACHED, _DTYPE = PROMPTS * (PROMPT + GROUP * OWN) * 4 * K * D, {"dtype": "bfloat16"}
_PACKED = {shared: 4 * D * pairs(shared) for shared in (True, False)}
_HEAD = 2 * 1024 * C * V
CASES = (
    Case(name="decode, 8 x 8 sequences of 82", op="attention.decode", facts=HEADS, make=decode,
         bytes=_CACHED),
    Case(name="step, 8 x 8 sequences of 82", op="attention.step", facts=HEADS, make=step, bytes=_CACHED),
    Case(name="prefill, 8 prompts of 82", op="attention.prefill", facts=HEADS, make=prefill,
         flops=4 * D * H * PROMPTS * 82 * 83 / 2),
    Case(name="varlen, 64 of 114", op="attention.varlen", facts=HEADS, make=packed(False, False),
         flops=_PACKED[False]),
    Case(name="varlen backward", op="attention.varlen", facts=HEADS, make=packed(False, True),
         flops=2.5 * _PACKED[False]),
    Case(name="shared prefix, 8 x (50 + 8 x 64)", op="attention.shared_prefix", facts=HEADS,
         make=packed(True, False), flops=_PACKED[True]),
    Case(name="shared prefix backward", op="attention.shared_prefix", facts=HEADS, make=packed(True, True),
         flops=2.5 * _PACKED[True]),
    Case(name="norm with residual, 64 rows", op="norm.rms", facts=_DTYPE, make=norm(64, False),
         bytes=64 * C * 8),
    Case(name="norm with residual, 4096 rows", op="norm.rms", facts=_DTYPE, make=norm(4096, False),
         bytes=4096 * C * 8),
    Case(name="norm backward, 4096 rows", op="norm.rms", facts=_DTYPE, make=norm(4096, True),
         bytes=4096 * C * 6),
    Case(name="swiglu, 64 rows", op="mlp.swiglu", facts=_DTYPE, make=swiglu(64, False), bytes=64 * F * 6),
    Case(name="swiglu, 4096 rows", op="mlp.swiglu", facts=_DTYPE, make=swiglu(4096, False),
         bytes=4096 * F * 6),
    Case(name="swiglu backward, 4096 rows", op="mlp.swiglu", facts=_DTYPE, make=swiglu(4096, True),
         bytes=4096 * F * 10),
    Case(name="rope, 4096 tokens", op="rope.apply", facts=_DTYPE, make=rope,
         bytes=4096 * ((H + K) * D * 4 + D * 4)),
    Case(name="linear, 64 x 576 x 3072", op="linear.packed", facts=_DTYPE, make=linear,
         flops=2 * 64 * C * 2 * F),
    Case(name="sample, 64 rows", op="sample.token", facts=_DTYPE, make=sample(None), bytes=64 * V * 2),
    Case(name="sample, top-p 0.9", op="sample.token", facts=_DTYPE, make=sample(0.9), bytes=64 * V * 2),
    Case(name="logprob, 1024 tokens", op="loss.logprob", facts=_DTYPE, make=logprob(False), flops=_HEAD),
    Case(name="logprob backward", op="loss.logprob", facts=_DTYPE, make=logprob(True), flops=3 * _HEAD),
    Case(name="adamw, 8 M parameters", op="optim.adamw", facts={"dtype": "float32"}, make=adamw,
         bytes=8 * (1 << 20) * 30),
)  # fmt: skip
