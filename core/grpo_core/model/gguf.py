"""GGUF to Hugging Face layout, through transformers' own reader, with what that reader loses put back."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from ..errors import CheckpointError
from .checkpoint_io import write_checkpoint, write_json

SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""`tokenizer.ggml.pre` of the vocabularies that split numbers into digits before the byte-level split."""
NEEDED = ("gguf", "accelerate")
LOADER_KEYS = (
    "quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype",
    "torch_dtype",
)  # fmt: skip
"""Traces of the GGUF loader in the config; a checkpoint with them would be taken for a quantised one."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise `file` to bfloat16 and write weights, config, tokenizer and chat template to `folder`.

    Raises `CheckpointError` when a package is missing or transformers cannot read the file.
    """
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise CheckpointError(
            f"{file.name} cannot be converted",
            why=f"reading GGUF needs {' and '.join(absent)}",
            fix='pip install "grpo-core[quickstart]"',
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=name, local_files_only=True, **{_dtype_key(): torch.float32}
        )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{file} cannot be converted",
            why=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            fix="use the model's safetensors checkpoint, or another GGUF file that transformers reads",
        ) from error
    tokenizer = _plain_tokenizer(tokenizer, _pre_tokenizer_name(file), model.config.max_position_embeddings)
    tokenizer.save_pretrained(str(folder))
    _generic_class(folder / "tokenizer_config.json")
    config = _plain_config(model, tokenizer)
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    tensors = (
        (key, value.to(torch.bfloat16)) for key, value in model.state_dict().items() if key not in tied
    )
    write_checkpoint(folder, tensors, config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(folder / "generation_config.json", ends)


def _dtype_key() -> str:
    return "dtype" if Version(version("transformers")) >= Version("4.56") else "torch_dtype"


def _generic_class(path: Path) -> None:
    # The name that transformers 4 and 5 both load without changing the tokenizer.
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _plain_config(model: Any, tokenizer: Any) -> dict[str, Any]:
    config = {key: value for key, value in model.config.to_dict().items() if key not in LOADER_KEYS}
    config["architectures"] = [type(model).__name__]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, key)
        if value is not None:
            config[key] = value
    return config


def _pre_tokenizer_name(file: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(str(file)).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def _plain_tokenizer(tokenizer: Any, pre: str, max_length: int) -> Any:
    """The same vocabulary under the generic class, whose loading changes nothing, digits split again."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    split = backend.pre_tokenizer
    if pre in SINGLE_DIGITS and "Digits" not in str(split):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None},
    )
    plain.chat_template = tokenizer.chat_template
    return plain
