"""The work of bench_family.py and who does it: this project's decoder and engine, transformers' model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from family_models import SPARSE, VOCABULARY
from rollout_engines import hf, native

Run = Callable[[], float]
"""Do the work once; returns the mean log-probability, so that both sides can be seen to do the same."""
EXPERTS = ("grouped_mm", "eager", "batched_mm")
"""transformers' experts implementations. The last copies an expert's weights for every token: gigabytes in a
forward pass over many, and transformers itself decodes with grouped_mm on a CPU; so it is tried on demand."""
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Prompts as token ids, each with its completions."""

    groups: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]
    shared: bool
    """Whether a group's prompt may be computed once."""

    @property
    def sequences(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt, completion) of every sequence."""
        return [(prompt, ids) for prompt, completions in self.groups for ids in completions]

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of all sequences, each prompt counted as often as it is used."""
        return sum(len(prompt) + len(ids) for prompt, ids in self.sequences)


def even_work(sequences: int, length: int) -> Work:
    """Sequences of one length, nothing shared: no padding to avoid and nothing to compute once."""
    draw = random.Random(0)
    half = length // 2
    groups = tuple((_ids(draw, half), (_ids(draw, length - half),)) for _ in range(sequences))
    return Work(groups=groups, shared=False)


def grpo_work(prompts: int, group: int, prompt: int, completion: int) -> Work:
    """A GRPO step's: groups that share a prompt, completions from a quarter of the longest up."""
    draw = random.Random(1)
    groups = []
    for _ in range(prompts):
        lengths = [draw.randint(completion // 4, completion) for _ in range(group)]
        groups.append((_ids(draw, prompt), tuple(_ids(draw, length) for length in lengths)))
    return Work(groups=tuple(groups), shared=True)


def _ids(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.randrange(4, VOCABULARY) for _ in range(length))


def product_flops(folder: Path, work: Work) -> float:
    """Floating-point operations of the products with weights, forward and backward: six for each weight that
    a token meets, the output projection where a token is predicted. Attention's own products come on top."""
    from grpo_core.model.hf_config import read_hf_config
    from grpo_core.model.scale import items
    from grpo_core.plugins import load

    config = read_hf_config(folder)
    active = dict.fromkeys(("head", "embedding", "rest"), 0)
    for item in items(load().model_plugin_for(config["architectures"]).arch(config)):
        active[item.name if item.name in active else "rest"] += item.count * item.active
    predicted = sum(len(ids) for _, ids in work.sequences)
    return 6.0 * (work.tokens * active["rest"] + predicted * active["head"])


def our_training(folder: Path, dtype: str, work: Work, pins: Mapping[str, str]) -> Run:
    """Forward and backward of the trainer's decoder on the offers that the plan chooses."""
    import torch

    from grpo_core.algo.packing import pack
    from grpo_core.backend import bind
    from grpo_core.devices.pick import pick_device
    from grpo_core.model.checkpoint_io import load_checkpoint
    from grpo_core.model.hf_config import read_hf_config
    from grpo_core.model.transformer import Decoder
    from grpo_core.needs import RunFacts, needs_of
    from grpo_core.plugins import load
    from grpo_core.resolve import resolve

    catalogue = load()
    device, info = pick_device("cpu", catalogue)
    config = read_hf_config(folder)
    family = catalogue.model_plugin_for(config["architectures"])
    arch = family.arch(config)
    facts = RunFacts(train_dtype=dtype, rollout_dtype=dtype)
    backend = bind(resolve(needs_of(arch, facts), catalogue, info, pins=pins))
    decoder = Decoder(arch, backend, device=device.open(0), dtype=getattr(torch, dtype))
    load_checkpoint(folder, family.weights(arch), decoder.state_dict())
    (batch,) = pack(_scored(work), micro_tokens=2**40, share_prompt=work.shared, device=device.open(0))
    advantage_L = batch.advantages_N[batch.completion_L]
    parents = batch.parents_S if bool((batch.parents_S >= 0).any()) else None

    def run() -> float:
        decoder.zero_grad(set_to_none=True)
        hidden_TC = decoder(
            batch.tokens_T, batch.positions_T, cu_seqlens=batch.cu_seqlens, parents=parents,
            max_seqlen=batch.max_seqlen, recompute=False,
        )  # fmt: skip
        logprob_L, _ = backend.loss.logprob(
            hidden_TC.index_select(0, batch.predict_L), decoder.head_weight(), batch.labels_L,
            temperature=1.0, group=None,
        )  # fmt: skip
        (-(advantage_L * logprob_L)).mean().backward()
        return float(logprob_L.detach().mean())

    return run


def _scored(work: Work) -> list[Any]:
    from grpo_core.types import Completion, Sample, Scored

    found = []
    for number, (prompt, completions) in enumerate(work.groups):
        for index, ids in enumerate(completions):
            completion = Completion(
                prompt_id=number, index=index, token_ids=ids, text="", logprobs=(0.0,) * len(ids),
                logprobs_t1=(0.0,) * len(ids), finish_reason="length", weight_version=0,
            )  # fmt: skip
            found.append(
                Scored(
                    sample=Sample(id=str(number)),
                    prompt_token_ids=prompt,
                    completion=completion,
                    rewards={},
                    reward=0.0,
                    advantage=_advantage(len(found)),
                )
            )
    return found


def _advantage(index: int) -> float:
    return 1.0 if index % 2 else -1.0


def their_training(folder: Path, dtype: str, work: Work, settings: Mapping[str, str]) -> Run:
    """Forward and backward of transformers' model on sequences padded to the longest.

    Padding is on the right, where causality hides it, so that no mask is needed; the output projection
    runs only where a completion's token is predicted. Both are quicker than what a trainer usually does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **settings).train()
    rows = work.sequences
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    predict, labels, advantage = [], [], []
    for row, (prompt, ids) in enumerate(rows):
        tokens[row, : len(prompt) + len(ids)] = torch.tensor(prompt + ids)
        predict += [row * width + len(prompt) - 1 + place for place in range(len(ids))]
        labels += ids
        advantage += [_advantage(row)] * len(ids)
    predict_L, labels_L = torch.tensor(predict), torch.tensor(labels)
    advantage_L = torch.tensor(advantage)

    def run() -> float:
        network.zero_grad(set_to_none=True)
        hidden_BTC = network.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits_LV = network.lm_head(hidden_BTC.flatten(0, 1).index_select(0, predict_L))
        logprob_L = -torch.nn.functional.cross_entropy(logits_LV.float(), labels_L, reduction="none")
        (-(advantage_L * logprob_L)).mean().backward()
        return float(logprob_L.detach().mean())

    return run


def our_decoding(folder: Path, dtype: str, prompts: Sequence[Sequence[int]], group: int, new: int,
                 pins: Mapping[str, str]) -> Run:  # fmt: skip
    """The native rollout engine; the returned mean is of the tokens that it drew."""
    longest = max(map(len, prompts)) + new
    generate = native(str(folder), dtype, len(prompts) * group, longest, pins)
    return _decoding(generate, prompts, group, new)


def their_decoding(folder: Path, dtype: str, prompts: Sequence[Sequence[int]], group: int, new: int,
                   settings: Mapping[str, str]) -> Run:  # fmt: skip
    """transformers' `generate`."""
    generate = hf(str(folder), dtype, len(prompts) * group, 0, {}, **settings)
    return _decoding(generate, prompts, group, new)


def _decoding(generate: Any, prompts: Sequence[Sequence[int]], group: int, new: int) -> Run:
    seeds = iter(range(0, 2**62, 10**6))

    def run() -> float:
        found = generate(prompts, group, new, next(seeds))
        drawn = [value for row in found.logprobs for value in row]
        if len(drawn) != len(prompts) * group * new:
            raise RuntimeError(f"{len(drawn)} tokens were drawn, not {len(prompts) * group * new}")
        return sum(drawn) / len(drawn)

    return run


def peer_settings(family: str, experts: Sequence[str]) -> list[dict[str, str]]:
    """What is tried for transformers; the fastest is the one that counts."""
    if family not in SPARSE:
        return [{"attn_implementation": name} for name in ATTENTION]
    return [
        {"attn_implementation": attention, "experts_implementation": name}
        for attention, name in product(ATTENTION, experts)
    ]
