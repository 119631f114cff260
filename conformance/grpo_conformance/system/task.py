"""What the tiny models learn: to name the digit that their prompt is made of. And the settings of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGITS = "0123"
VOCABULARY = ("<pad>", "<eos>", "<bos>", "<unk>", *DIGITS, *"abcdefgh")
PROMPTS, GROUP, TOKENS = 8, 8, 6
TEMPERATURE = 0.9
"""Not 1, where it could be forgotten."""


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json with one token a character."""
    special = [
        {
            "id": i, "content": word, "special": True, "single_word": False, "normalized": False,
            "lstrip": False, "rstrip": False,
        }
        for i, word in enumerate(VOCABULARY[:4])
    ]  # fmt: skip
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(VOCABULARY)},
            "unk_token": "<unk>",
        },
    }  # fmt: skip
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )


def write_data(path: Path) -> Path:
    """Prompts of different lengths: "222" has the answer "2"."""
    rows = [{"prompt": digit * count, "answer": digit} for digit in DIGITS for count in (3, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model: Path, data: Path, device: str, **changes: Any) -> dict[str, Any]:
    """The tree of a run's configuration; `changes` name keys with `__` for a dot."""
    tree: dict[str, Any] = {
        "model": str(model),
        "device": device,
        "data": {"train": str(data), "options": {"plain": True}},
        # Called in this process, where other rewards need one of their own.
        "rewards": [{"name": "number"}],
        "algo": {"group_size": GROUP},
        "rollout": {"prompts": PROMPTS, "max_tokens": TOKENS, "temperature": TEMPERATURE},
        "train": {"steps": 1, "lr": 5e-3, "dtype": "float32"},
        "run": {"threads": 1, "save_every": 0, "keep": 9},
    }
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return tree


def text_of(tree: Mapping[str, Any]) -> str:
    """As a configuration file: JSON is YAML."""
    return json.dumps(tree)
