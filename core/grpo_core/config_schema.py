"""The schema as a tree of dotted keys: what exists, where, and what a mistyped key probably meant."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from .config import Config
from .yaml_source import KeyPath

# What other trainers (TRL, verl, ChatLearn) call the same setting.
ALIASES = {
    "num_generations": "algo.group_size", "n_samples_per_prompt": "algo.group_size",
    "learning_rate": "train.lr", "max_steps": "train.steps", "total_steps": "train.steps",
    "lr_scheduler_type": "train.schedule", "adam_beta1": "train.beta1", "adam_beta2": "train.beta2",
    "beta": "algo.kl_coef", "epsilon": "algo.clip_low", "epsilon_high": "algo.clip_high",
    "clip_ratio_low": "algo.clip_low", "clip_ratio_high": "algo.clip_high", "clip_ratio_c": "algo.clip_dual",
    "num_iterations": "algo.epochs", "ppo_epochs": "algo.epochs", "ppo_mini_batch_size": "algo.mini_batches",
    "max_completion_length": "rollout.max_tokens", "max_response_length": "rollout.max_tokens",
    "max_new_tokens": "rollout.max_tokens", "batch_size": "rollout.prompts",
    "train_batch_size": "rollout.prompts", "max_prompt_length": "data.max_prompt_tokens",
    "model_name_or_path": "model", "output_dir": "run.dir", "save_steps": "run.save_every",
    "eval_steps": "eval.every", "report_to": "run.trackers", "reward_funcs": "rewards",
    "gradient_checkpointing": "train.recompute",
}  # fmt: skip


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model class of a section's annotation, else None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def entry_of(annotation: Any) -> Any:
    """The value type of a list or mapping annotation, else None."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (list, dict) and args:
        return args[-1]
    return None


@cache
def leaf_keys(model: type[BaseModel] = Config, prefix: str = "") -> tuple[str, ...]:
    """Dotted settings with none below them, in the schema's order; entries of lists as `rewards.*.name`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        entry = section_of(entry_of(field.annotation))
        if section is not None:
            keys.extend(leaf_keys(section, f"{prefix}{name}."))
        elif entry is not None:
            keys.extend(leaf_keys(entry, f"{prefix}{name}.*."))
        else:
            keys.append(prefix + name)
    return tuple(keys)


def annotation_at(path: KeyPath) -> Any:
    """Type of the setting at `path`; `Any` inside a free mapping. Raises `KeyError` where no setting is."""
    annotation: Any = Config
    for part in path:
        section = section_of(annotation)
        if section is not None:
            if part not in section.model_fields:
                raise KeyError(part)
            annotation = section.model_fields[str(part)].annotation
        elif annotation is not Any:
            annotation = entry_of(annotation)
            if annotation is None:
                raise KeyError(part)
    return annotation


def suggest(dotted: str) -> str | None:
    """The dotted key of the schema that was probably meant, else None."""
    found = _nearest(dotted)
    if found is None or "*" not in found:
        return found
    numbers = iter(part for part in dotted.split(".") if part.isdigit())
    return ".".join(next(numbers, "0") if part == "*" else part for part in found.split("."))


def _nearest(dotted: str) -> str | None:
    known = [*leaf_keys(), *Config.model_fields, "train.options", "rollout.options"]
    leaf = dotted.rpartition(".")[2]
    numbered = ".".join("*" if part.isdigit() else part for part in dotted.split("."))
    if leaf in ALIASES:
        return ALIASES[leaf]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    if same_leaf:
        return difflib.get_close_matches(numbered, same_leaf, n=1, cutoff=0.0)[0]
    near = difflib.get_close_matches(numbered, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    leaves = {key.rpartition(".")[2]: key for key in known}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[near[0]] if near else None
