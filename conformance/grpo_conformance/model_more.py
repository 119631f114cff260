"""Checks of a model family besides those of its numbers: shards, chat, recipe."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.errors import GrpoError
from grpo_core.impl import DeviceInfo

from .model_case import Measured, ModelCase, check_written

if TYPE_CHECKING:
    from grpo_core.model.chat import Chat
    from grpo_core.model.plugin import ChatSpec

SHARD_BYTES = 20_000
MESSAGES = ({"role": "system", "content": "a b"}, {"role": "user", "content": "c d"})
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} STOP {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if SWITCH is defined %}{{ SWITCH }}{% endif %}"
)
DEVICES = (
    DeviceInfo(type="cpu", dtypes=frozenset({"float32", "bfloat16", "float64"})),
    DeviceInfo(type="other", dtypes=frozenset({"float32", "float16"}), name="a chip without bfloat16"),
    DeviceInfo(type="other", dtypes=frozenset({"bfloat16", "float32"}), features=frozenset({"fast_bf16"}),
               count=8, memory_bytes=64 << 30),
)  # fmt: skip
WORLDS = (1, 8, 64)
CONFIG = "model: tiny\ndata: {train: rows.jsonl}\nrewards: [{name: exact}]\n"
"""A run that says nothing of its own; what it names is not opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent(Exception):
    """What a check is about is not there, in words."""

    reason: str


def check_shards(case: ModelCase) -> Measured:
    """A checkpoint in several files is read as one in a single file is, and written so that transformers
    reads it."""
    import torch

    from grpo_core.model.checkpoint_io import INDEX, load_checkpoint, read_tensors, write_checkpoint

    from .model_parts import load_decoder

    arch = case.family.arch(case.hf_config)
    table = case.family.weights(arch)
    decoder = load_decoder(case)
    wanted = {name: value.clone() for name, value in decoder.state_dict().items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.hf_model.save_pretrained(folder, max_shard_size=f"{SHARD_BYTES // 1000}KB")
        _expect((folder / INDEX).is_file(), "the tiny model fits into one shard, so that nothing is shown")
        into = {key: torch.full_like(value, 7) for key, value in wanted.items()}
        load_checkpoint(folder, table, into)
        source = dict(read_tensors(folder))
    changed = [key for key, value in wanted.items() if not torch.equal(into[key], value)]
    _expect(not changed, f"from shards these come otherwise: {', '.join(changed[:6])}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, table.export(wanted), arch.hf_config, max_shard_bytes=SHARD_BYTES)
        _expect((folder / INDEX).is_file(), "one file was written in spite of the limit")
        return check_written(case, source, folder)


def check_chat(spec: ChatSpec, folder: Path | None) -> None:
    """What a family says of chatting is well-formed and is heeded: by the folder's own tokenizer where one is
    given, else by one with the family's special tokens."""
    from grpo_core.model.chat import Chat

    _expect(
        isinstance(spec.stop_tokens, tuple) and all(isinstance(t, str) and t for t in spec.stop_tokens),
        f"stop_tokens must be a tuple of tokens, not {spec.stop_tokens!r}",
    )
    _expect(
        spec.thinking is None or (isinstance(spec.thinking, str) and spec.thinking.isidentifier()),
        f"thinking must be None or the name of a variable of templates, not {spec.thinking!r}",
    )
    if folder is not None:
        chat = Chat.from_folder(folder, spec)
        if not chat.tokenizer.chat_template:
            raise Absent(reason="the folder's tokenizer has no chat template")
        _speaks(chat)
        return
    with tempfile.TemporaryDirectory() as name:
        _write_tokenizer(Path(name), spec)
        chat = Chat.from_folder(Path(name), spec)
        special = chat.tokenizer.get_added_vocab()
        deaf = [token for token in spec.stop_tokens if special[token] not in chat.stop_token_ids]
        _expect(not deaf, f"{', '.join(deaf)} would not end a turn")
        _speaks(chat)
        if spec.thinking:
            switched = (Chat.from_folder(Path(name), spec, thinking=how) for how in ("on", "off"))
            both = [chat.encode(MESSAGES) for chat in switched]
            _expect(both[0] != both[1], f"{spec.thinking} changes nothing in a template that has it")


def _speaks(chat: Chat) -> None:
    """Messages become tokens, among them what was said; the conversation so far is not taken as ended."""
    ids = chat.encode(MESSAGES)
    text = chat.tokenizer.decode(list(ids))
    _expect(len(ids) > 0 and "c" in text and "d" in text, f"the template loses what the user says: {text!r}")
    longer = chat.encode((*MESSAGES, {"role": "assistant", "content": "e"}, *MESSAGES[1:]))
    _expect(len(longer) > len(ids), "a longer conversation has no more tokens")
    _expect(ids[-1] != chat.eos_token_id, "the prompt ends with the token that ends a turn")


def _write_tokenizer(folder: Path, spec: ChatSpec) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", *"abcde", "system", "user", "assistant", "True", "False", "STOP", "<end>"]
    special = [*dict.fromkeys((*spec.stop_tokens, "<end>"))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    template = TEMPLATE.replace("SWITCH", spec.thinking or "no_such_switch")
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "unk_token": "[UNK]",
        "additional_special_tokens": special, "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")


def check_recipe(family: Any, hf_config: Mapping[str, Any]) -> None:
    """The recipe sets values that the schema takes, each with its reason, on devices of all kinds; a user's
    own value wins."""
    from grpo_core.config_loader import merge_recipe, parse_config
    from grpo_core.model.plugin import Advice

    arch = family.arch(hf_config)
    for device in DEVICES:
        for world in WORLDS:
            where = f"on {device.name or device.type} with {world} processes"
            recipe = family.recipe(arch, device, world)
            _expect(isinstance(recipe, Mapping), f"the recipe {where} is {recipe!r}, not a mapping")
            for key, advice in recipe.items():
                _expect(isinstance(advice, Advice), f"{key} {where} is {advice!r}, not an Advice")
                _expect(bool(str(advice.why).strip()), f"{key} {where} has no reason")
            try:
                merge_recipe(parse_config(CONFIG), recipe, family.name)
            except GrpoError as error:
                raise AssertionError(f"the recipe {where} is refused: {error}") from error
    lr = merge_recipe(parse_config(CONFIG + "train: {lr: 0.25}\n"), recipe, family.name).config.train.lr
    _expect(lr == 0.25, f"the recipe's train.lr wins over the user's: {lr}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
