"""Tokenizers that a model ships as `tiktoken.model`, read without the code that comes beside it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError

FILE = "tiktoken.model"
RESERVED = 256
"""Special tokens behind the ranked ones, named or not."""
LETTER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
MOONSHOT = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{LETTER}*{SMALL}+{CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{LETTER}+{SMALL}*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How Moonlight and Kimi cut text before merging bytes; a rank file says nothing of it."""
PATTERNS: Mapping[str, str] = MappingProxyType({"TikTokenTokenizer": MOONSHOT})
"""`tokenizer_class` of tokenizer_config.json -> pattern."""
TEXTS = ("bos_token", "eos_token", "unk_token", "pad_token")


def has_tiktoken(folder: Path) -> bool:
    """Whether the folder's tokenizer is a rank file, and nothing that transformers reads itself."""
    return (folder / FILE).is_file() and not (folder / "tokenizer.json").is_file()


def read_tiktoken(folder: Path) -> Any:
    """A `PreTrainedTokenizerFast` with the same ids; no code of the folder runs.

    Raises `CheckpointError` for a damaged file, or a tokenizer class whose way to cut text is not known.
    """
    from transformers import PreTrainedTokenizerFast

    config = _config(folder)
    kind = str(config.get("tokenizer_class"))
    if kind not in PATTERNS:
        raise CheckpointError(
            f"the tokenizer of {folder} cannot be read",
            why=f"{FILE} holds ranks only, and how {kind} cuts text is in code, which is not run",
            fix="convert it to tokenizer.json once, with the code of the model that you trust",
        )
    ranks = _ranks(folder / FILE)
    named = {
        int(number): entry["content"] for number, entry in (config.get("added_tokens_decoder") or {}).items()
    }
    special = [
        named.get(number, f"<|reserved_token_{number}|>")
        for number in range(len(ranks), len(ranks) + RESERVED)
    ]
    texts = {
        key: value["content"] if isinstance(value, Mapping) else value
        for key in TEXTS
        if (value := config.get(key)) is not None
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=byte_pair_tokenizer(ranks, special, PATTERNS[kind]),
        clean_up_tokenization_spaces=False, **texts,
    )  # fmt: skip
    template = folder / "chat_template.jinja"
    made.chat_template = template.read_text("utf-8") if template.is_file() else config.get("chat_template")
    return made


def byte_pair_tokenizer(ranks: Mapping[bytes, int], special: list[str], pattern: str) -> Any:
    """A `tokenizers.Tokenizer` that merges the bytes of each piece of text, lowest rank first.

    ranks number the tokens from 0; `special` ones follow.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    # Every way to make a token out of two others, in the order of the tokens.
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _letters() -> list[str]:
    """A visible character for each byte, the one that byte-level tokenizers agree on (GPT-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


def _ranks(path: Path) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError, binascii.Error) as error:
        raise _damaged(path, str(error)) from error
    if not pairs or sorted(ranks.values()) != list(range(len(pairs))):
        raise _damaged(path, "its ranks do not number the tokens from 0 without a gap")
    return ranks


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    return config if isinstance(config, dict) else {}


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read", why=why, fix="download the model again")
