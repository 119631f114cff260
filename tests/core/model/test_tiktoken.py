"""Rank files against tiktoken's rule, done naively: cut by the pattern, then merge the lowest rank first."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.errors import CheckpointError
from grpo_core.model.chat import Chat
from grpo_core.model.plugin import ChatSpec
from grpo_core.model.tiktoken import MOONSHOT, RESERVED, byte_pair_tokenizer, has_tiktoken, read_tiktoken

TEXT = (
    "The quick brown Fox's tail, don't they'LL see? 12345 67 "
    "\u5317\u4eac\u5e02Pascal \u4e2d\u6587English\u6df7\u5408"
    "  \n\n spaces   here\tand na\u00efve caf\u00e9 \U0001f600!! ABCdef GHI\r\nend the the then there"
)
LETTERS = "the hinst'LlDd 19\u4eac\u5e02\u00e9\u0301\r\n\t.,!\u0661\U0001f600ABZ"
TEMPLATE = (
    "{% for message in messages %}<|im_{{ message['role'] }}|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>{% endif %}"
)


def trained_ranks(count: int = 60) -> dict[bytes, int]:
    """All bytes, then the most frequent pairs of neighbours within pieces of the text."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces = [[bytes([b]) for b in piece.encode()] for piece in cut(TEXT)]
    for _ in range(count):
        pairs: dict[bytes, int] = {}
        for piece in pieces:
            for left, right in pairwise(piece):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        best = max(sorted(pairs), key=lambda token: pairs[token])
        ranks.setdefault(best, len(ranks))
        pieces = [merged(piece, best) for piece in pieces]
    return ranks


def merged(piece: list[bytes], token: bytes) -> list[bytes]:
    found: list[bytes] = []
    for part in piece:
        if found and found[-1] + part == token:
            found[-1] = token
        else:
            found.append(part)
    return found


def cut(text: str) -> list[str]:
    # Version 1 of this library knows `&&` in a set, as the Rust engine of tiktoken does.
    return [found.group() for found in regex.finditer(MOONSHOT, text, flags=regex.V1)]


def naive(text: str, ranks: dict[bytes, int]) -> list[int]:
    ids = []
    for piece in cut(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            pairs = [left + right for left, right in pairwise(parts)]
            at = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))
            if pairs[at] not in ranks:
                break
            parts[at : at + 2] = [pairs[at]]
        ids += [ranks[part] for part in parts]
    return ids


RANKS = trained_ranks()


def write_folder(folder: Path, **changes: Any) -> int:
    """A folder as Moonlight has it; returns the number of ranked tokens."""
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS.items()]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    base = len(RANKS)
    special = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 255: "[PAD]"}
    config = {
        "tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]",
        "pad_token": {"content": "[PAD]"}, "chat_template": TEMPLATE,
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "added_tokens_decoder": {
            str(base + number): {"content": text, "special": True} for number, text in special.items()
        },
    } | changes  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_moonshot.py").write_text("raise SystemExit('code of the folder was run')\n")
    return base


def test_ids_are_those_of_lowest_rank_first(tmp_path: Path) -> None:
    write_folder(tmp_path)
    tokenizer = read_tiktoken(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == naive(TEXT, RANKS) and max(ids) > 256
    assert tokenizer.decode(ids) == TEXT


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        st.sampled_from("the hinst'LlDd 19\u4eac\u5e02\u00e9\u0301\r\n\t.,!\u0661\U0001f600ABZ"), max_size=30
    )
)
def test_any_text_is_cut_and_merged_as_by_hand(text: str) -> None:
    tokenizer = shared_tokenizer()
    assert tokenizer.encode(text).ids == naive(text, RANKS)


MADE: list[Any] = []


def shared_tokenizer() -> Any:
    if not MADE:
        MADE.append(byte_pair_tokenizer(RANKS, [], MOONSHOT))
    return MADE[0]


def test_chat_of_such_a_folder_runs_no_code(tmp_path: Path) -> None:
    base = write_folder(tmp_path)
    assert has_tiktoken(tmp_path)
    chat = Chat.from_folder(tmp_path, ChatSpec(stop_tokens=("<|im_end|>",)))
    assert chat.stop_token_ids == (base + 1, base + 2) and chat.eos_token_id == base + 1
    ids = chat.encode([{"role": "user", "content": "the end"}])
    assert ids == (base + 3, *naive("the end", RANKS), base + 2, base + 4)
    assert chat.decode((*naive("the", RANKS), base + 2)) == "the"
    assert len(chat.tokenizer) == base + RESERVED
    assert chat.tokenizer.convert_tokens_to_ids(f"<|reserved_token_{base + 9}|>") == base + 9
    assert chat.tokenizer.pad_token_id == base + 255


def test_a_way_to_cut_text_that_is_in_code_only_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_class="QWenTokenizer")
    with pytest.raises(CheckpointError, match="QWenTokenizer cuts text is in code"):
        read_tiktoken(tmp_path)


@pytest.mark.parametrize("text", ["", "IQ== 0 7", "IQ==\n", "IQ== 1\n", "**** 0\n", "IQ== 0\nIg== 2\n"])
def test_a_damaged_rank_file_is_told(text: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tiktoken.model").write_text(text)
    with pytest.raises(CheckpointError, match=r"tiktoken\.model"):
        read_tiktoken(tmp_path)


def test_a_tokenizer_json_beside_it_is_preferred(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert not has_tiktoken(tmp_path)
