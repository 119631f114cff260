"""Text to tokens and back: chat template and the tokens that end a turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, DataError
from .plugin import ChatSpec
from .tiktoken import has_tiktoken, read_tiktoken

SILENT = ChatSpec()
"""Of a model of no known family."""


class Chat:
    """A tokenizer with its chat template and the ids that end an assistant turn."""

    def __init__(
        self, tokenizer: Any, *, stop_token_ids: tuple[int, ...], name: str,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self._decode = _decoder(tokenizer)
        self.template_options = dict(template_options or {})
        """Variables that the chat template gets besides the messages: {"enable_thinking": False}."""
        self.stop_token_ids = stop_token_ids
        """Sorted; the tokenizer's and generation config's eos among them."""
        self.name = name
        self.eos_token_id: int = (
            stop_token_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        )

    @classmethod
    def from_folder(cls, path: Path | str, spec: ChatSpec = SILENT, *, thinking: str = "auto") -> Chat:
        """Read the tokenizer of a model folder; nothing is downloaded and no code of the folder runs.

        `spec` is the family's; those of its stop tokens that this tokenizer has as special tokens count.
        `thinking` is "auto", "on" or "off". Raises `CheckpointError` where there is no tokenizer or nothing
        can end a turn, `ConfigError` where thinking is to be switched and the template has no switch.
        """
        folder = Path(path)
        tokenizer = read_tiktoken(folder) if has_tiktoken(folder) else _tokenizer(folder)
        special = tokenizer.get_added_vocab()
        ids = {special[token] for token in spec.stop_tokens if token in special}
        ids |= _eos_of(folder / "config.json") | _eos_of(folder / "generation_config.json")
        if tokenizer.eos_token_id is not None:
            ids.add(int(tokenizer.eos_token_id))
        if not ids:
            raise CheckpointError(
                f"nothing ends a completion of {folder}",
                why="neither the tokenizer nor config.json names an eos token",
                fix="set eos_token in tokenizer_config.json or eos_token_id in generation_config.json",
            )
        return cls(
            tokenizer, stop_token_ids=tuple(sorted(ids)), name=folder.name,
            template_options=_switch(tokenizer, spec, thinking, folder.name),
        )  # fmt: skip

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
                [dict(message) for message in prompt], add_generation_prompt=True, tokenize=False,
                **self.template_options,
            )  # fmt: skip
        except TemplateError as error:
            raise DataError(
                f"the chat template of {self.name} refuses a prompt", why=str(error),
                fix="check the roles and their order in the data",
            ) from error  # fmt: skip
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens; bytes that are no text become U+FFFD."""
        return self._decode(list(ids))


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Ids to text. Where a tokenizer decodes as `transformers` does by default, its backend is asked itself:
    the wrapper takes several times as long, for each completion of a step."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")
    ):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return lambda ids: str(
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def _is_plain(folder: Path) -> bool:
    """Whether the folder names the class that is tokenizer.json and nothing else."""
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    kind = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return kind in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        # To find this class, AutoTokenizer reads the model's config with all that it imports: 90 MB.
        plain = _is_plain(folder)
        kind = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer of {folder} cannot be read",
            why=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            fix="put tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def _switch(tokenizer: Any, spec: ChatSpec, thinking: str, name: str) -> dict[str, bool]:
    if thinking == "auto":
        return {}
    if spec.thinking is None or spec.thinking not in str(tokenizer.chat_template or ""):
        raise ConfigError(
            f"data.thinking {thinking!r} has no effect on {name}",
            why="its chat template has no switch for thinking"
            + (f" ({spec.thinking})" if spec.thinking else ""),
            fix="remove data.thinking, or use a model with such a template",
        )
    return {spec.thinking: thinking == "on"}


def _eos_of(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return {int(one) for one in (value if isinstance(value, list) else [value]) if one is not None}
