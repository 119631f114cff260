"""TRL's GRPO step on the same job. Prints one JSON line; run it with an interpreter that has TRL.

    VENV/bin/python benchmarks/bench_trl.py --model DIR --data prompts.jsonl --prompts 8 --group 8 \\
        --completion 64 --attn sdpa --micro 16

The defaults here are the settings that were fastest for TRL 1.16 on a CPU: bfloat16 autocast over float32
weights (what trains; --weights bfloat16 is a little leaner and learns nothing at these learning rates), no
gradient checkpointing, no reference model, fused AdamW. --tcmalloc PATH preloads an allocator, which TRL
gains from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from typing import Any

from common import Job, add_job_arguments, emit, job_from, record


def arguments() -> argparse.Namespace:
    """The job and TRL's own settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_job_arguments(parser)
    parser.add_argument("--attn", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--micro", type=int, default=0, help="completions of one pass; 0 is all of the step")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tcmalloc", default="", help="shared library to preload")
    return parser.parse_args()


def preload(library: str) -> None:
    """Start again with `library` preloaded, once."""
    if library and library not in os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, *sys.argv])


class Clock:
    """Seconds by phase; `outermost` phases only, so that nothing is counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.depth = 0
        self.steps: list[dict[str, float]] = []
        self.began = time.perf_counter()

    def wrap(self, phase: str, function: Any) -> Any:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

        return timed

    def lap(self) -> None:
        """End a step."""
        now = time.perf_counter()
        step = now - self.began
        self.steps.append({**self.seconds, "step": step, "other": step - sum(self.seconds.values())})
        self.seconds, self.began = {}, now


def build(job: Job, args: argparse.Namespace, clock: Clock) -> Any:
    """A GRPOTrainer whose phases report to `clock`."""
    import datasets
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if job.threads:
        torch.set_num_threads(job.threads)
    with open(job.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    dtype = getattr(torch, args.weights)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation=args.attn)
    samples = job.prompts * job.group
    micro = args.micro or samples
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-trl-"), use_cpu=True,
        bf16=job.dtype == "bfloat16" and args.weights == "float32", fp16=False,
        per_device_train_batch_size=micro, gradient_accumulation_steps=samples // micro,
        num_generations=job.group, max_completion_length=job.completion,
        generation_kwargs={"min_new_tokens": job.completion}, temperature=1.0, beta=0.0, learning_rate=1e-6,
        lr_scheduler_type="constant", max_steps=job.warmup + job.steps, shuffle_dataset=False,
        gradient_checkpointing=False, optim="adamw_torch_fused", save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, seed=1,
    )  # fmt: skip

    class Laps(TrainerCallback):  # type: ignore[misc]
        """Marks where steps begin and end."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            optimizer.step = clock.wrap("train", optimizer.step)
            clock.began, clock.seconds = time.perf_counter(), {}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.lap()

    trainer = GRPOTrainer(
        model=model, reward_funcs=last_number_reward, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows), callbacks=[Laps()],
    )  # fmt: skip
    for phase, owner, name in (
        ("rollout", trainer, "_generate"),
        ("reward", trainer, "_calculate_rewards"),
        ("train", trainer, "compute_loss"),
        ("logprob", trainer, "_get_per_token_logps_and_entropies"),
        ("train", trainer.accelerator, "backward"),
        ("train", trainer.accelerator, "clip_grad_norm_"),
    ):
        setattr(owner, name, clock.wrap(phase, getattr(owner, name)))
    return trainer


def last_number_reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 when the last number of the completion is the answer."""
    import re

    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    found = [re.findall(r"-?\d+", text) for text in texts]
    return [
        float(bool(numbers) and numbers[-1] == truth) for numbers, truth in zip(found, answer, strict=True)
    ]


def main() -> int:
    """Run the job."""
    args = arguments()
    preload(args.tcmalloc)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    # Libraries print to standard output too; only the result may go there.
    out = os.dup(1)
    os.dup2(2, 1)
    job = job_from(args)
    clock = Clock()
    began = time.perf_counter()
    trainer = build(job, args, clock)
    startup = time.perf_counter() - began
    trainer.train()
    import transformers
    import trl

    logged = [row for row in trainer.state.log_history if "reward" in row]
    # TRL counts the prompt of each completion; ours is counted once a group.
    sampled = logged[0]["completions/mean_length"] * job.prompts * job.group
    result = record(
        "trl", job, clock.steps[job.warmup :], startup_s=round(startup, 3),
        first_step_s=round(clock.steps[0]["step"], 3),
        settings={"attn": args.attn, "micro": args.micro, "weights": args.weights, "preload": args.tcmalloc},
        versions={"trl": trl.__version__, "transformers": transformers.__version__},
        mean_length=[row["completions/mean_length"] for row in logged],
        prompt_tokens=(logged[0]["num_tokens"] - sampled) / job.group,
    )  # fmt: skip
    sys.stdout.flush()
    os.dup2(out, 1)
    emit(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
