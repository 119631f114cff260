"""The faults, a row each: name, the level that must catch it, where it sits, what it does.

A row with a lambda is a new mutant; what takes more stands in `faults`. Names are unique. See `Mutant`.
"""

from __future__ import annotations

from dataclasses import replace

from .faults import attention, collectives, device, moe, small, state, system
from .mutant import Mutant

VARLEN, SHARED = "attention.varlen", "attention.shared_prefix"
COMM = "comm.collectives"
DECODE, PREFILL, CACHE = "attention.decode", "attention.prefill", "attention.cache"


class _Everything:
    def __contains__(self, value: object) -> bool:
        return True


PLUGINS: tuple[Mutant, ...] = (
    Mutant("torch at import", "plugin", "plugin", "touches_torch"),
    Mutant("crash at import", "plugin", "plugin", "crashes_at_import"),
    Mutant("slow import", "plugin", "plugin", "slow_to_import"),
    Mutant("two offers of one name", "plugin", "plugin", "offers_twice"),
    Mutant("hook without the marker", "plugin", "plugin", "hook_without_marker"),
    Mutant("hook that raises", "plugin", "plugin", "raises_in_a_hook"),
    Mutant("refusal without a reason", "plugin", "norm.rms", None,
           lambda impl: replace(impl, when=lambda device, need: "")),
    Mutant("refusal that raises", "plugin", "norm.rms", None,
           lambda impl: replace(impl, when=lambda device, need: str(need.facts["hidden_size"]))),
    Mutant("limits that allow everything", "plugin", "norm.rms", None,
           lambda impl: replace(impl, limits={"dtype": _Everything()})),
    Mutant("contract of the future", "plugin", "norm.rms", None,
           lambda impl: replace(impl, contract=impl.contract + 7)),
    Mutant("gradients of a draw", "plugin", "sample.token", None,
           lambda impl: replace(impl, backward=True)),
    Mutant("another signature", "plugin", "norm.rms", None,
           lambda impl: replace(impl, load="grpo_core.ops.reference.fused:swiglu")),
    Mutant("pointer to nothing", "plugin", "norm.rms", None,
           lambda impl: replace(impl, load="grpo_core.ops.reference.fused:rms_norm_fused")),
)  # fmt: skip
DEVICE: tuple[Mutant, ...] = (
    Mutant("seed ignored", "device", "device", device.seed_ignored),
    Mutant("RNG state not restored", "device", "device", device.state_not_restored),
    Mutant("RNG state of the host", "device", "device", device.state_of_the_host),
    Mutant("generator keeps its state", "device", "switch", lambda ops: ops.quirk("keep_rng", True)),
    Mutant("pinned copy not synchronised", "device", "device", device.synchronises_nothing),
    Mutant("copy that never lands", "device", "switch", lambda ops: ops.quirk("lost_copy", True)),
    Mutant("event over too early", "device", "switch", lambda ops: ops.quirk("early_events", True)),
    Mutant("stream order ignored", "device", "switch", lambda ops: ops.quirk("deaf_streams", True)),
    Mutant("host operand accepted", "device", "switch", lambda ops: ops.quirk("accept_host", True)),
    Mutant("any index opens", "device", "device", device.opens_any_index),
    Mutant("probe that changes", "device", "device", device.probe_of_the_moment),
    Mutant("dtype that is not there", "device", "device", device.dtype_that_is_not_there),
    Mutant("scatter not deterministic", "device", "switch",
           lambda ops: ops.inject("aten::index_add", 3, "zero")),
    Mutant("one addition in ten lost", "device", "switch", lambda ops: ops.inject("aten::add", 10, "zero")),
)  # fmt: skip
ATTENTION: tuple[Mutant, ...] = (
    Mutant("mask off by one", "ops", VARLEN, attention.mask_off_by_one),
    Mutant("window off by one", "ops", VARLEN, attention.window_off_by_one),
    Mutant("window ignored", "ops", VARLEN, attention.window_ignored),
    Mutant("scale forgotten", "ops", VARLEN, attention.scale_forgotten),
    Mutant("softmax in bf16", "ops", VARLEN, attention.softmax_in_bfloat16),
    Mutant("attention accumulates in bf16", "ops", VARLEN, attention.accumulates_in_bfloat16),
    Mutant("reduction in another order", "ops", VARLEN, attention.sums_in_another_order),
    Mutant("heads mapped otherwise", "ops", VARLEN, attention.heads_in_another_order),
    Mutant("gradient of v is zero", "ops", VARLEN, attention.no_gradient_of_values),
    Mutant("backward only declared", "ops", VARLEN, attention.no_gradients),
    Mutant("NaN for length 1", "ops", VARLEN, attention.nan_for_length_one),
    Mutant("wrong above 2^16 elements", "ops", VARLEN, attention.wrong_above_65536_elements),
    Mutant("out-of-bounds write of a row", "ops", VARLEN, attention.writes_a_row_too_many),
    Mutant("input scaled in place", "ops", VARLEN, attention.scales_in_place),
    Mutant("strides ignored", "ops", VARLEN, attention.strides_ignored),
    Mutant("packing ignored", "ops", VARLEN, attention.packing_ignored),
    Mutant("always causal", "ops", VARLEN, attention.always_causal),
    Mutant("NaN times zero", "ops", VARLEN, attention.nan_times_zero),
    Mutant("wrong in the second call", "ops", VARLEN, attention.wrong_in_the_second_call),
    Mutant("result of the first call", "ops", VARLEN, attention.result_of_the_first_call),
    Mutant("hang", "ops", VARLEN, attention.hangs, timeout=6.0),
    Mutant("crash", "ops", VARLEN, attention.crashes),
    Mutant("garbage returned", "ops", VARLEN, attention.returns_garbage),
    Mutant("limits that lie", "ops", VARLEN, attention.multiples_of_sixteen,
           lambda impl: replace(impl, limits={**impl.limits, "head_dim": range(8, 257, 8)})),
    Mutant("prompt unseen", "ops", SHARED, attention.prompt_unseen),
    Mutant("prompt's gradient of one child", "ops", SHARED, attention.prompts_gradient_of_one_child),
    Mutant("decode one position late", "ops", DECODE, attention.newest_token_unseen),
    Mutant("window ignored in decode", "ops", DECODE, attention.window_ignored),
    Mutant("first page read again", "ops", DECODE, attention.first_page_again),
    Mutant("mask from the top left", "ops", PREFILL, attention.mask_from_the_top_left),
    Mutant("stale page after a fork", "ops", CACHE, attention.stale_page),
    Mutant("pages not given back", "ops", CACHE, attention.pages_kept),
    Mutant("shared pages given back", "ops", CACHE, attention.shared_pages_freed),
    Mutant("released cache keeps its pool", "ops", CACHE, attention.pool_kept),
)  # fmt: skip
STATE: tuple[Mutant, ...] = (
    Mutant("rotary part forgotten", "ops", "mla.varlen", state.rotary_part_forgotten),
    Mutant("latent's gradient half", "ops", "mla.varlen", state.latent_without_the_gradient_of_values),
    Mutant("scale of the latent", "ops", "mla.decode", state.scale_of_the_latent),
    Mutant("state not reset between sequences", "ops", "gated_delta.chunk", state.state_carried_over),
    Mutant("first state ignored", "ops", "gated_delta.chunk", state.first_state_ignored),
    Mutant("decay lost between chunks", "ops", "gated_delta.chunk", state.decay_lost_between_chunks),
    Mutant("strong decay clamped", "ops", "gated_delta.chunk", state.strong_decay_overflows),
    Mutant("state in another slot", "ops", "gated_delta.step", state.states_by_row),
    Mutant("convolution across sequences", "ops", "short_conv.varlen", state.convolves_across_sequences),
    Mutant("kernel turned round", "ops", "short_conv.varlen", state.kernel_turned_round),
    Mutant("window not moved", "ops", "short_conv.step", state.window_not_moved),
)
MOE: tuple[Mutant, ...] = (
    Mutant("bias as routing weight", "ops", "moe.route", moe.bias_in_the_weights),
    Mutant("ties to the highest id", "ops", "moe.route", moe.ties_to_the_highest_id),
    Mutant("replay ignored", "ops", "moe.route", moe.replay_ignored),
    Mutant("replay with other weights", "ops", "moe.route", moe.replay_keeps_old_weights),
    Mutant("groups ignored", "ops", "moe.route", moe.groups_ignored),
    Mutant("routing factor forgotten", "ops", "moe.route", moe.factor_forgotten),
    Mutant("always normalised", "ops", "moe.route", moe.always_normalised),
    Mutant("router in bf16", "ops", "moe.route", moe.scores_in_bfloat16),
    Mutant("token dropped in dispatch", "ops", "moe.dispatch", moe.token_dropped),
    Mutant("token twice in dispatch", "ops", "moe.dispatch", moe.token_twice),
    Mutant("gate and up swapped", "ops", "moe.experts", moe.gate_and_up_swapped),
    Mutant("idle experts skipped", "ops", "moe.experts", moe.experts_without_tokens_skipped),
    Mutant("tile of 64 rows", "ops", "moe.experts", moe.block_cut_short),
    Mutant("experts in bf16", "ops", "moe.experts", moe.experts_in_bfloat16),
    Mutant("gradient of down is zero", "ops", "moe.experts", moe.gradient_of_idle_experts),
    Mutant("routing weights forgotten", "ops", "moe.combine", moe.weights_forgotten),
    Mutant("expert twice in combine", "ops", "moe.combine", moe.first_place_twice),
)
SMALL: tuple[Mutant, ...] = (
    Mutant("eps outside of the root", "ops", "norm.rms", small.eps_outside_of_the_root),
    Mutant("zero-centred ignored", "ops", "norm.rms", small.zero_centred_ignored),
    Mutant("residual not returned", "ops", "norm.rms", small.residual_not_returned),
    Mutant("squares overflow", "ops", "norm.rms", small.squares_overflow),
    Mutant("rotary pairs swapped", "ops", "rope.apply", small.pairs_swapped),
    Mutant("rotary backwards", "ops", "rope.apply", small.turned_backwards),
    Mutant("keys one position late", "ops", "rope.apply", small.angles_of_the_row_before),
    Mutant("rest of the head lost", "ops", "rope.apply", small.whole_head_turned),
    Mutant("angles in bf16", "ops", "rope.apply", small.angles_in_bfloat16),
    Mutant("GELU for SiLU", "ops", "mlp.swiglu", small.gelu_for_silu),
    Mutant("gate clamped", "ops", "mlp.swiglu", small.gate_clamped),
    Mutant("main gradient replaced", "ops", "linear.dense", small.main_gradient_replaced),
    Mutant("bias forgotten", "ops", "linear.dense", small.bias_forgotten),
    Mutant("linear accumulates in bf16", "ops", "linear.dense", small.accumulates_in_bfloat16),
    Mutant("packed weights not updated", "ops", "linear.packed", small.old_weights),
    Mutant("log-prob of another temperature", "ops", "loss.logprob", small.wrong_temperature),
    Mutant("temperature twice in the gradient", "ops", "loss.logprob",
           small.temperature_twice_in_the_gradient),
    Mutant("entropy without a gradient", "ops", "loss.logprob", small.no_gradient_of_entropy),
    Mutant("padded vocabulary counts", "ops", "loss.logprob", small.padded_vocabulary),
    Mutant("labels of 16 bits", "ops", "loss.logprob", small.labels_of_sixteen_bits),
    Mutant("top-p keeps one too many", "ops", "sample.token", small.top_p_keeps_one_more),
    Mutant("given numbers ignored", "ops", "sample.token", small.numbers_ignored),
    Mutant("log-prob before the filters", "ops", "sample.token", small.log_probs_before_the_filters),
    Mutant("temperature 0 draws", "ops", "sample.token", small.temperature_zero_draws),
    Mutant("L2 for decoupled decay", "ops", "optim.adamw", small.decay_in_the_gradient),
    Mutant("bias correction forgotten", "ops", "optim.adamw", small.bias_correction_forgotten),
    Mutant("gradient scale ignored", "ops", "optim.adamw", small.gradient_scale_ignored),
    Mutant("low-precision copies left behind", "ops", "optim.adamw", small.copies_left_behind),
    Mutant("last tensor of a list forgotten", "ops", "optim.adamw", small.first_tensor_alone),
)  # fmt: skip
MEMORY: tuple[Mutant, ...] = (
    Mutant("freed memory still counted", "memory", "switch", lambda ops: ops.quirk("leak", True)),
    Mutant("peak does not follow", "memory", "switch", lambda ops: ops.quirk("low_peak", True)),
    Mutant("peak not reset", "memory", "switch", lambda ops: ops.quirk("stuck_peak", True)),
    Mutant("more than there is", "memory", "switch", lambda ops: ops.quirk("no_capacity", True)),
    Mutant("out of memory as RuntimeError", "memory", "switch",
           lambda ops: ops.quirk("plain_refusal", True)),
    Mutant("page lost in sleep", "memory", "memory.allocator", device.page_lost_in_sleep),
    Mutant("last bytes lost in sleep", "memory", "memory.allocator", device.last_element_lost),
    Mutant("sleep frees nothing", "memory", "memory.allocator", device.sleep_frees_nothing),
    Mutant("dirty memory wakes", "memory", "memory.allocator", device.wakes_with_other_tensors),
    Mutant("all tags sleep", "memory", "memory.allocator", device.all_tags_sleep),
    Mutant("views counted twice", "memory", "memory.allocator", device.counts_views_twice),
    Mutant("unknown tags pass", "memory", "memory.allocator", device.unknown_tags_pass),
    Mutant("leak in every sleep", "memory", "memory.allocator", device.rounds_are_kept),
)  # fmt: skip
COLLECTIVES: tuple[Mutant, ...] = (
    Mutant(
        "all-to-all counts transposed", "collectives", COMM, collectives.counts_transposed, ask="all_to_all"
    ),
    Mutant("average without the division", "collectives", COMM, collectives.average_without_division),
    Mutant(
        "broadcast from the first rank",
        "collectives",
        COMM,
        collectives.broadcast_from_the_first,
        ask="broadcast",
    ),
    Mutant("all-gather backwards", "collectives", COMM, collectives.gathered_backwards, ask="all_gather"),
    Mutant(
        "reduce-scatter's next share",
        "collectives",
        COMM,
        collectives.share_of_the_next,
        ask="reduce_scatter",
    ),
    Mutant("reduced in bf16", "collectives", COMM, collectives.reduced_in_bfloat16),
    Mutant("integers reduced in float32", "collectives", COMM, collectives.integers_in_float32),
    Mutant("rank of the world in a group", "collectives", COMM, collectives.rank_of_the_world, ask="groups"),
    Mutant("barrier for nobody", "collectives", COMM, collectives.barrier_for_nobody, ask="barrier"),
    Mutant("strided target lost", "collectives", COMM, collectives.strided_target_lost, ask="broadcast"),
    Mutant("every rank has its own bits", "collectives", COMM, collectives.bits_of_each_rank),
    Mutant(
        "unknown reduction is a sum", "collectives", COMM, collectives.unknown_op_is_a_sum, ask="refusals"
    ),
    Mutant("dies with a peer", "collectives", COMM, collectives.dies_with_a_peer, ask="lost/dead-before"),
    Mutant("timeout ignored", "collectives", COMM, collectives.timeout_ignored, ask="never-comes"),
)
ROLLOUT, TRAIN = "engine.rollout", "engine.train"
SYSTEM: tuple[Mutant, ...] = (
    Mutant("tensor lost in a weight sync", "system", ROLLOUT, system.tensor_lost_in_sync, ask="dense/sync"),
    Mutant("weight version kept", "system", ROLLOUT, system.version_kept, ask="dense/sync"),
    Mutant("rollout's seeds ignored", "system", ROLLOUT, system.seeds_ignored, ask="dense/trajectory"),
    Mutant("log-probs of the next token", "system", ROLLOUT, system.log_probs_of_the_next_token,
           ask="dense/agreement"),
    Mutant("experts of the token before", "system", ROLLOUT, system.experts_of_the_token_before,
           ask="mla/agreement"),
    Mutant("first token of a prompt lost", "system", ROLLOUT, system.first_token_of_the_prompt_lost,
           ask="dense/agreement"),
    Mutant("trainer ignores replay", "system", TRAIN, system.replay_ignored, ask="mla/replay"),
    Mutant("completions one position late", "system", TRAIN, system.completions_one_position_late,
           ask="dense/agreement"),
    Mutant("advantages of the neighbour", "system", TRAIN, system.advantages_of_the_neighbour,
           ask="dense/trajectory"),
    Mutant("old log-probs not taken", "system", TRAIN, system.old_log_probs_not_taken,
           ask="dense/trajectory"),
    Mutant("reference moves along", "system", TRAIN, system.reference_moves_along, ask="dense/trajectory"),
    Mutant("moments not restored", "system", TRAIN, system.moments_not_restored, ask="dense/resume"),
    Mutant("master weights not restored", "system", TRAIN, system.master_weights_not_restored,
           ask="dense/resume/bfloat16"),
    Mutant("state lost in sleep", "system", "memory.allocator", system.first_bytes_lost_in_sleep,
           ask="dense/sleep"),
    Mutant("rotary base ignored", "system", "rope.apply", system.angles_of_another_base,
           ask="dense/agreement"),
    Mutant("weight decay forgotten", "system", "optim.adamw", system.decay_forgotten,
           ask="dense/trajectory"),
)  # fmt: skip
MUTANTS: tuple[Mutant, ...] = (
    *PLUGINS, *DEVICE, *ATTENTION, *STATE, *MOE, *SMALL, *MEMORY, *COLLECTIVES, *SYSTEM,
)  # fmt: skip
