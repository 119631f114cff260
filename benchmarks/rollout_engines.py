"""The engines that bench_rollout.py compares, each behind the same small face.

Every engine is imported in a process of its own; vLLM's has neither this project nor reasoning-gym, so this
file takes token ids and imports an engine inside its function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Generate = Callable[[Sequence[Sequence[int]], int, int, int], "Rollouts"]
"""(prompts as ids, group, new tokens, seed) -> what was drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """What one call drew: ids and their log-probs, group by group."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    prefill_s: float | None = None


def native(model: str, dtype: str, max_sequences: int, max_len: int, pins: Mapping[str, str]) -> Generate:
    """This project's engine on the offers that its plan chooses for the CPU."""
    from pathlib import Path

    import torch

    from grpo_core.backend import bind
    from grpo_core.devices.pick import pick_device
    from grpo_core.model.chat import Chat
    from grpo_core.model.hf_config import read_hf_config
    from grpo_core.needs import RunFacts, needs_of
    from grpo_core.plugins import load
    from grpo_core.resolve import resolve
    from grpo_core.rollout.base import RolloutSetup
    from grpo_core.types import Prompt, Sampling

    catalogue = load(off=())
    device, info = pick_device("cpu", catalogue)
    config = read_hf_config(Path(model))
    family = catalogue.model_plugin_for(config["architectures"])
    arch = family.arch(config)
    needs = needs_of(arch, RunFacts(train_dtype=dtype, rollout_dtype=dtype))
    backend = bind(resolve(needs, catalogue, info, pins=pins, fallback="none"))
    engine = backend.engine.rollout(
        RolloutSetup(
            arch=arch, weight_map=family.weights(arch),
            chat=Chat.from_folder(model, family.chat()), backend=backend, device=device.open(0),
            dtype=getattr(torch, dtype), model_path=model, max_sequences=max_sequences,
            max_model_len=max_len, options={},
        )
    )  # fmt: skip

    def generate(prompts: Sequence[Sequence[int]], group: int, new: int, seed: int) -> Rollouts:
        before = engine.describe()["counters"]["prefill_seconds"]
        wanted = [
            Prompt(id=i, token_ids=tuple(ids), seeds=tuple(range(seed + i * group, seed + (i + 1) * group)))
            for i, ids in enumerate(prompts)
        ]
        found = sorted(
            engine.generate(wanted, Sampling(max_tokens=new, min_tokens=new)),
            key=lambda completion: (completion.prompt_id, completion.index),
        )
        return Rollouts(
            token_ids=[list(completion.token_ids) for completion in found],
            logprobs=[list(completion.logprobs) for completion in found],
            prefill_s=engine.describe()["counters"]["prefill_seconds"] - before,
        )

    return generate


def hf(
    model: str, dtype: str, max_sequences: int, max_len: int, pins: Mapping[str, str], **settings: str
) -> Generate:
    """transformers' `generate`: one static batch, left padding; SDPA unless `settings` say otherwise."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **settings).eval()

    def generate(prompts: Sequence[Sequence[int]], group: int, new: int, seed: int) -> Rollouts:
        width = max(len(ids) for ids in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        recorder = Recorder(torch, width)
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = network.generate(
                ids, attention_mask=mask, num_return_sequences=group, do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=new, eos_token_id=None, pad_token_id=0,
                logits_processor=[recorder],
            )  # fmt: skip
        recorder.take(out)
        return Rollouts(
            token_ids=out[:, width:].tolist(), logprobs=torch.stack(recorder.logprobs, 1).tolist()
        )

    return generate


class Recorder:
    """A logits processor that notes the log-prob of each drawn token, one step late.

    Cheaper than `output_scores`, which keeps [steps, B, V].
    """

    def __init__(self, torch: Any, width: int) -> None:
        self.torch, self.width = torch, width
        self.scores: Any = None
        self.logprobs: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.scores is not None:
            self.take(input_ids)
        self.scores = scores
        return scores

    def take(self, input_ids: Any) -> None:
        """Note the token that the last scores gave."""
        drawn = input_ids[:, self.width + len(self.logprobs)]
        chosen = self.scores.gather(1, drawn[:, None])[:, 0].float()
        self.logprobs.append(chosen - self.scores.float().logsumexp(1))


def vllm(
    model: str, dtype: str, max_sequences: int, max_len: int, pins: Mapping[str, str], *, eager: bool = False
) -> Generate:
    """vLLM's CPU build in this process, prefix caching over blocks of 32 (its 128 never share a prompt)."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    if eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from vllm import LLM, SamplingParams

    engine = LLM(
        model, dtype=dtype, enforce_eager=eager, max_model_len=max_len, max_num_seqs=max_sequences,
        block_size=32, kv_cache_memory_bytes=512 << 20, disable_log_stats=True,
    )  # fmt: skip

    def generate(prompts: Sequence[Sequence[int]], group: int, new: int, seed: int) -> Rollouts:
        settings = SamplingParams(
            n=group, temperature=1.0, top_k=0, top_p=1.0, max_tokens=new, ignore_eos=True, logprobs=0,
            detokenize=False,
        )  # fmt: skip
        # Prompts stay in its prefix cache from one round to the next, which a new rollout's would not.
        engine.reset_prefix_cache()
        outputs = engine.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], settings, use_tqdm=False
        )
        found = [one for output in outputs for one in output.outputs]
        return Rollouts(
            token_ids=[list(one.token_ids) for one in found],
            logprobs=[
                [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
                for one in found
            ],
        )

    return generate


def vllm_eager(model: str, dtype: str, max_sequences: int, max_len: int, pins: Mapping[str, str]) -> Generate:
    """vLLM without torch.compile."""
    return vllm(model, dtype, max_sequences, max_len, pins, eager=True)


ENGINES = {"native": native, "hf": hf, "vllm": vllm, "vllm-eager": vllm_eager}
