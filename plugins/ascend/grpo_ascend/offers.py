"""What the Ascend plugin offers, as data; imports no torch. Limits are the vendor's, each with its source.

Sources: torch_npu 2.13.0's operator documentation (`_op_plugin_docs.py` in the wheel), and for prefill over
pages in TND the way that vllm-ascend calls the same op.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

from grpo_core.impl import NOTHING, DeviceInfo, Impl, Need
from grpo_core.ops.contract import CONTRACTS

CONTRACT = 1
"""Version of the contracts that the plugin's own functions are written for."""
EARLIER = frozenset({"moe.experts"})
"""Written for version 0: its gradients of weights go through autograd."""
PAGE = 128
"""Tokens of a page of a cache: the block size that the vendor recommends."""
TORCH_NPU = ("torch-npu>=2.7.1.post4,!=2.8.0,!=2.8.0.post2,!=2.9.0,<2.15",)
"""Builds for CANN 9.0 and later: the older ones write the cache in another layout. The audit holds every call
against each release that this admits; `vendor_surface.json` lists them."""
PROOF = "simulated"
"""Of every offer: its cases stand in `conformance/reports/ascend-simulated.json`, as a test makes sure."""
FUSED, PLAIN = 80, 40
"""Ranks: the vendor's kernels, plain torch on the NPU."""
CACHE_ID = "ascend:paged"

GRAPH = frozenset(
    {
        "attention.cache", "attention.decode", "attention.step", "mla.cache", "mla.decode", "norm.rms",
        "rope.apply", "mlp.swiglu", "linear.packed", "linear.dense", "gated_delta.step", "short_conv.step",
        "moe.route", "moe.experts", "moe.combine",
    }
)  # fmt: skip
"""Ops of a decode step whose host waits for nothing; plain torch over pages waits, and so does counting the
tokens of experts."""

Limits = Mapping[str, Container[object]]

HALVES = frozenset({"bfloat16", "float16"})
FLOATS = HALVES | {"float32"}
_FLOATS: Limits = {"dtype": FLOATS}
_READS: Limits = {"cache": frozenset({CACHE_ID})}
_HEADS: Limits = {
    "head_dim": range(1, 769),
    "v_head_dim": range(1, 769),
    "num_key_value_groups": range(1, 257),
}
_INFER: Limits = {
    "dtype": HALVES,
    "head_dim": range(16, 513, 16),
    "v_head_dim": range(16, 513, 16),
    "num_key_value_groups": range(1, 65),
    "window": frozenset({False}),
    **_READS,
}
_TND: Limits = {**_INFER, "head_dim": frozenset({64, 128}), "v_head_dim": frozenset({64, 128})}
"""The documentation has 128 alone; vllm-ascend runs models of 64 this way too."""
_ROTARY: Limits = {"rotary_dim": range(2, 896, 2)}
_ABSORBED: Limits = {
    "dtype": HALVES,
    "num_attention_heads": frozenset({1, 2, 4, 8, 16, 32, 64, 128}),
    "kv_lora_rank": frozenset({512}),
    "qk_rope_head_dim": frozenset({64}),
    **_READS,
}
_GATED: Limits = {"router_dtype": frozenset({"float32"}), "num_experts": range(2, 2049)}
_GROUPED: Limits = {
    **_FLOATS,
    "num_experts": range(2, 2049),
    "hidden_size": range(1, 65536),
    "intermediate_size": range(1, 32768),
}

_FUSION = ("npu_fusion_attention",)
_FIA, _SCATTER = "npu_fused_infer_attention_score", "npu_scatter_pa_kv_cache"
_GMM = "npu_grouped_matmul"


def same_head_dim(info: DeviceInfo, need: Need) -> str | None:
    """Why keys and values of different sizes are refused."""
    key, value = (need.facts.get(name) for name in ("head_dim", "v_head_dim"))
    return None if key == value else f"values of {value} beside keys of {key}: the vendor wants one size"


def wide_keys(info: DeviceInfo, need: Need) -> str | None:
    """Why values wider than keys are refused, or latent heads wider than the vendor's widest."""
    facts = {name: int(str(size)) for name, size in need.facts.items() if str(size).isdigit()}
    key = facts.get("head_dim", facts.get("qk_nope_head_dim", 0) + facts.get("qk_rope_head_dim", 0))
    value = facts.get("v_head_dim", 0)
    if value > key:
        return f"values of {value} are wider than keys of {key}"
    return f"keys of {key} are wider than 768" if key > 768 else None


def expert_groups(info: DeviceInfo, need: Need) -> str | None:
    """Why experts in groups of one or two, or of more than 2048 after padding, are refused."""
    experts, groups = (int(str(need.facts.get(name, 1))) for name in ("num_experts", "num_groups"))
    each = experts // groups
    if groups > 1 and each <= 2:
        return f"groups of {each} experts: the vendor wants three or more"
    padded = -(-each // 32) * 32 * groups
    return f"{groups} groups of {each} experts fill {padded} places of 2048" if padded > 2048 else None


def offers(hook: str) -> Iterable[Impl]:
    """The offers of one hook."""
    for impl in (*_attention(), *_latent(), *_experts(), *_small(), *_system(), *_torch()):
        if CONTRACTS[impl.op].hook == hook:
            yield impl


def _attention() -> Iterable[Impl]:
    train = {**_FLOATS, **_HEADS}
    yield _fused("attention.varlen", "fusion:varlen", train, _FUSION, when=wide_keys)
    yield _fused("attention.shared_prefix", "fusion:shared_prefix", train, _FUSION, when=wide_keys)
    yield _fused("attention.cache", "infer:KeyValueCache", _FLOATS, (_SCATTER,), name="paged")
    yield _fused("attention.prefill", "infer:prefill", _TND, (_FIA,), when=same_head_dim)
    yield _fused("attention.decode", "infer:decode", _INFER, (_FIA,), when=same_head_dim)
    stepped = (_FIA, "npu_rms_norm", "npu_rotary_mul", _SCATTER)
    limits = {**_INFER, **_ROTARY}
    yield _fused("attention.step", "infer:step", limits, stepped, when=same_head_dim)
    yield _plain("attention.prefill", "plain:prefill", {**_FLOATS, **_READS})
    yield _plain("attention.decode", "plain:decode", {**_FLOATS, **_READS})


def _latent() -> Iterable[Impl]:
    yield _fused("mla.varlen", "latent:varlen", _FLOATS, _FUSION, when=wide_keys)
    yield _fused("mla.cache", "latent:LatentPageCache", _FLOATS, (_SCATTER,), name="paged")
    yield _fused("mla.prefill", "latent:prefill", {**_FLOATS, **_READS}, _FUSION, when=wide_keys)
    yield _fused("mla.decode", "latent:decode", _ABSORBED, (f"{_FIA}_v2",))
    yield _plain("mla.prefill", "plain:mla_prefill", {**_FLOATS, **_READS})
    yield _plain("mla.decode", "plain:mla_decode", {**_FLOATS, **_READS})


def _experts() -> Iterable[Impl]:
    yield _fused("moe.route", "moe:route", _GATED, ("npu_moe_gating_top_k",), when=expert_groups)
    permuted = {**_FLOATS, "top_k": range(1, 513)}
    yield _fused("moe.dispatch", "moe:dispatch", permuted, ("npu_moe_token_permute",))
    yield _fused("moe.experts", "moe:experts", _GROUPED, (_GMM, "npu_swiglu"))
    yield _fused("moe.combine", "moe:combine", permuted, ("npu_moe_token_unpermute",))


def _small() -> Iterable[Impl]:
    yield _fused("norm.rms", "norm:rms_norm", _FLOATS, ("npu_rms_norm",))
    yield _fused("rope.apply", "rope:rope_apply", {**_FLOATS, **_ROTARY}, ("npu_rotary_mul",))
    yield _fused("mlp.swiglu", "mlp:swiglu", _FLOATS, ("npu_swiglu",))
    yield _fused("optim.adamw", "adamw:adamw", {"dtype": frozenset({"float32"})}, ("npu_apply_adam_w",))
    yield _plain("sample.token", "sample:sample_token", _FLOATS)


def _system() -> Iterable[Impl]:
    yield _fused("memory.allocator", "memory:NpuMemory", NOTHING, (), name="npu")
    yield _fused("comm.collectives", "collectives:Hccl", {"world": range(1, 65537)}, (), name="hccl")


def _torch() -> Iterable[Impl]:
    """Ops for which torch_npu has no op with the contract's meaning: the core's own torch on the NPU.

    Its gated delta rule keeps the state in bfloat16 and takes no gradients, its causal convolution has a
    width of 3; the contracts want float32 and any width.
    """
    for op in ("gated_delta.chunk", "gated_delta.step", "short_conv.varlen", "short_conv.step",
               "linear.dense", "linear.packed", "loss.logprob"):  # fmt: skip
        yield _plain(op, CONTRACTS[op].reference or "", _FLOATS)


def _fused(
    op: str, load: str, limits: Limits, symbols: tuple[str, ...], *, name: str = "npu",
    when: Callable[[DeviceInfo, Need], str | None] | None = None,
) -> Impl:  # fmt: skip
    return _offer(op, load, limits, name, FUSED, tuple(f"torch_npu.{one}" for one in symbols), when)


def _plain(op: str, load: str, limits: Limits) -> Impl:
    return _offer(op, load, limits, "torch", PLAIN, (), None)


def _offer(
    op: str, load: str, limits: Limits, name: str, rank: int, symbols: tuple[str, ...],
    when: Callable[[DeviceInfo, Need], str | None] | None,
) -> Impl:  # fmt: skip
    return Impl(
        op=op,
        name=name,
        device="npu",
        load=load if load.startswith("grpo_core.") else f"grpo_ascend.{load}",
        requires=TORCH_NPU,
        symbols=symbols,
        limits=limits,
        when=when,
        backward=CONTRACTS[op].backward,
        graph=op in GRAPH and (rank == FUSED or "cache" not in limits),
        deterministic=True,
        rank=rank,
        contract=CONTRACTS[op].version if load.startswith("grpo_core.") else CONTRACT - (op in EARLIER),
        proof=PROOF,
    )
