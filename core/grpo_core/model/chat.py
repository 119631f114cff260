"""Text to tokens and back: chat template and the tokens that end a turn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError


class Chat:
    """A tokenizer with its chat template and the ids that end an assistant turn."""

    def __init__(self, tokenizer: Any, *, stop_token_ids: tuple[int, ...], name: str) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        """Sorted; the tokenizer's and generation config's eos among them."""
        self.name = name
        self.eos_token_id: int = (
            stop_token_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        )

    @classmethod
    def from_folder(cls, path: Path | str, stop_tokens: tuple[str, ...] = ()) -> Chat:
        """Read the tokenizer of a model folder; nothing is downloaded and no code of the folder runs.

        `stop_tokens` are a family's; those that this tokenizer has as special tokens count. Raises
        `CheckpointError` where there is no tokenizer or nothing can end a turn.
        """
        from transformers import AutoTokenizer

        folder = Path(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"the tokenizer of {folder} cannot be read",
                why=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
                fix="put tokenizer.json and tokenizer_config.json of the model into the folder",
            ) from error
        special = tokenizer.get_added_vocab()
        ids = {special[token] for token in stop_tokens if token in special}
        ids |= _eos_of(folder / "config.json") | _eos_of(folder / "generation_config.json")
        if tokenizer.eos_token_id is not None:
            ids.add(int(tokenizer.eos_token_id))
        if not ids:
            raise CheckpointError(
                f"nothing ends a completion of {folder}",
                why="neither the tokenizer nor config.json names an eos token",
                fix="set eos_token in tokenizer_config.json or eos_token_id in generation_config.json",
            )
        return cls(tokenizer, stop_token_ids=tuple(sorted(ids)), name=folder.name)

    def encode(self, prompt: Sequence[Mapping[str, str]] | str) -> tuple[int, ...]:
        """Token ids of chat messages up to where the assistant speaks, or of plain text.

        Messages go through the chat template with its generation prompt; text gets the tokenizer's own
        special tokens (a beginning-of-text where the model has one). Raises `DataError` where the model
        has no template or the template refuses the messages.
        """
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt)["input_ids"])
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.name} has no chat template",
                why="the data has messages, and nothing says how this model wants to read them",
                fix="use an instruct model, add its chat_template.jinja, or set data.options.plain=true",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in prompt], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template of {self.name} refuses a prompt", why=str(error),
                fix="check the roles and their order in the data",
            ) from error  # fmt: skip
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens; bytes that are no text become U+FFFD."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def _eos_of(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return {int(one) for one in (value if isinstance(value, list) else [value]) if one is not None}
