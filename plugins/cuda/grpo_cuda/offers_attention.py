"""Offers of attention.* on CUDA, as data; imports no torch.

Sources of the limits: flash-attn 2.6.0 to 2.8.3 (csrc/flash_attn/flash_api.cpp: half precision, compute
capability 8.0, heads of 8 to 256 and one size of keys and values, pages of multiples of 256), torch 2.12
to 2.14 (torch/nn/attention/varlen.py, the same kernel), Transformer Engine 2.x with cuDNN 9 (THD from
9.0 on).
"""

from __future__ import annotations

from collections.abc import Iterator

from grpo_core.impl import DeviceInfo, Impl, Need

from .offer import (
    ALL_FLOATS,
    AMPERE,
    CACHE_ID,
    COMPILED,
    FLASH_ATTN,
    FLOATS,
    HALVES,
    HOPPER,
    SMALL_PAGES_ID,
    TORCH,
    TRANSFORMER_ENGINE,
    VENDOR,
    Limits,
    When,
    at_least,
    every,
    offer,
    same_head_dim,
)
from .offers_triton import REQUIRES as TRITON_PACKAGE

TORCH_VARLEN = ("torch>=2.12,<2.15",)
"""Releases whose `varlen_attn` has these arguments, grouped queries, windows and pages among them: it had
others before, and its last ones may change too."""
_READS: Limits = {"cache": frozenset({CACHE_ID})}
_READS_ANY: Limits = {"cache": frozenset({CACHE_ID, SMALL_PAGES_ID})}
_FLASH: Limits = {"dtype": HALVES, "head_dim": range(8, 257, 8)}
_POWERS = frozenset({16, 32, 64, 128, 256})
_FLEX: Limits = {"dtype": FLOATS, "head_dim": _POWERS, "v_head_dim": _POWERS}
_THD: Limits = {
    "dtype": HALVES,
    "head_dim": range(8, 129, 8),
    "v_head_dim": range(8, 129, 8),
    "window": frozenset({False}),
}
_TRAINING = ("attention.varlen", "attention.shared_prefix")
_ROLLOUT = ("attention.prefill", "attention.decode")
_VARLEN, _KVCACHE = "flash_attn.flash_attn_varlen_func", "flash_attn.flash_attn_with_kvcache"
_DPA = "transformer_engine.pytorch.DotProductAttention"


def wide_values(info: DeviceInfo, need: Need) -> str | None:
    """Refuses values wider than keys, which cuDNN's packed kernels do not take."""
    key, value = (int(str(need.facts[name])) for name in ("head_dim", "v_head_dim"))
    return f"values of {value} are wider than keys of {key}" if value > key else None


def _offers() -> Iterator[Impl]:
    flash: When = every(at_least(AMPERE, "flash-attn"), same_head_dim)
    built_in: When = every(at_least(AMPERE, "torch's varlen attention"), same_head_dim)
    engine: When = every(at_least(HOPPER, "cuDNN's attention of packed sequences"), wide_values)
    for op in _TRAINING:
        function = op.partition(".")[2]
        yield offer(op, "flash_attn", f"flash:{function}", rank=VENDOR + 2, limits=_FLASH,
                    requires=FLASH_ATTN, symbols=(_VARLEN,), when=flash)  # fmt: skip
        # cuDNN repeats its bits for some sizes and versions only.
        yield offer(op, "transformer_engine", f"engine:{function}", rank=VENDOR, limits=_THD,
                    requires=TRANSFORMER_ENGINE, symbols=(_DPA,), when=engine,
                    deterministic=False)  # fmt: skip
        yield offer(op, "varlen_attn", f"varlen:{function}", rank=COMPILED + 2, limits=_FLASH,
                    requires=TORCH_VARLEN, when=built_in)  # fmt: skip
        yield offer(op, "flex", f"flex:{function}", rank=TORCH + 10, limits=_FLEX,
                    when=at_least(AMPERE, "flex_attention"), deterministic=False)  # fmt: skip
        yield offer(op, "sdpa", f"sdpa:{function}", rank=TORCH, limits={"dtype": ALL_FLOATS})
    for name, cache, rank in (("paged", "PagedCache", VENDOR), ("small_pages", "SmallPageCache", VENDOR - 1)):
        yield offer("attention.cache", name, f"cache:{cache}", rank=rank, limits={"dtype": ALL_FLOATS},
                    graph=True)  # fmt: skip
    for op in _ROLLOUT:
        function = op.partition(".")[2]
        symbol = _KVCACHE if function == "decode" else _VARLEN
        # Decoding asks the device for nothing and the host for what does not change between steps.
        yield offer(op, "flash_attn", f"flash:{function}", rank=VENDOR + 2, limits={**_FLASH, **_READS},
                    requires=FLASH_ATTN, symbols=(symbol,), when=flash,
                    graph=function == "decode")  # fmt: skip
        yield offer(op, "varlen_attn", f"varlen:{function}", rank=COMPILED + 2, limits={**_FLASH, **_READS},
                    requires=TORCH_VARLEN, when=built_in, graph=function == "decode")  # fmt: skip
        yield offer(op, "paged", f"plain:{function}", rank=TORCH, limits={"dtype": ALL_FLOATS, **_READS_ANY})
    sizes: Limits = {"dtype": FLOATS, "head_dim": range(1, 257), "v_head_dim": range(1, 257)}
    # Below torch's kernel until the two have been measured side by side.
    yield offer("attention.decode", "triton", "cache_decode:decode", rank=COMPILED + 1,
                limits={**sizes, **_READS_ANY}, requires=TRITON_PACKAGE, graph=True, proof="simulated",
                when=at_least(AMPERE, "Triton"))  # fmt: skip


OFFERS: tuple[Impl, ...] = tuple(_offers())
