"""Stop strings over streams of tokens that split words and characters."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.rollout.stop import StopText

BYTES = 256


def decode_bytes(ids: Iterable[int]) -> str:
    """A byte-level tokenizer; ids from 256 on are the pieces below."""
    return b"".join(bytes([i]) if i < BYTES else PIECES[i - BYTES] for i in ids).decode("utf-8", "replace")


PIECES = [
    b"END",
    b"</",
    "\u65e5\u672c".encode()[:4],
    "\u65e5\u672c".encode()[4:],
    "\u00e9. E".encode(),
    b"\xff",
]


def feed(ids: list[int], stops: tuple[str, ...], *, min_tokens: int = 0) -> tuple[int, str] | None:
    """(tokens taken, text) when a stop string ended the stream."""
    text = StopText(decode_bytes, stops)
    for count, token in enumerate(ids, start=1):
        if text.push(token, check=count >= min_tokens):
            return count, text.text
    return None


def test_a_stop_string_may_span_tokens() -> None:
    assert feed(list(b"ab</answer>cd"), ("</answer>",)) == (11, "ab")
    assert feed([*b"ab", BYTES + 1, *b"answer>"], ("</answer>",)) == (10, "ab")


def test_a_stop_string_may_begin_and_end_inside_a_token() -> None:
    assert feed([ord("x"), BYTES + 4, *b"ND"], (". E",)) == (2, "x\u00e9")
    assert feed([ord("x"), BYTES + 0], ("N",)) == (2, "xE")


def test_split_characters_are_joined_before_the_search() -> None:
    ids = [*b"ab", BYTES + 2, BYTES + 3, ord("!")]
    assert feed(ids, ("\u672c",)) == (4, "ab\u65e5")
    assert feed(list("x\U0001f600y".encode()), ("\U0001f600",)) == (5, "x")
    assert feed(list("x\U0001f600y".encode()), ("\ufffd",)) is None


def test_a_stop_string_before_half_a_character_is_found_at_once() -> None:
    assert feed([*b"ab", *b"!", "\u00e9".encode()[0]], ("!",)) == (3, "ab")
    half_end = [*b"EN", BYTES + 2]
    assert feed([*half_end, BYTES + 3], ("\u65e5",)) == (3, "EN")


def test_bytes_that_are_no_text_do_not_hold_the_search_up() -> None:
    assert feed([BYTES + 5, BYTES + 5, *b"END"], ("END",)) == (5, "\ufffd\ufffd")


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    assert feed([*b"a", BYTES + 4], ("E", "\u00e9")) == (2, "a")


def test_text_before_min_tokens_does_not_stop() -> None:
    ids = list(b"a!b!c")
    assert feed(ids, ("!",), min_tokens=3) == (4, "a!b")
    assert feed(ids, ("!b",), min_tokens=3) == (3, "a")
    assert feed(ids, ("!",), min_tokens=2) == (2, "a")


def test_a_sentencepiece_decoder_that_strips_the_first_space_is_read_right() -> None:
    words = ["\u2581a", "\u2581b", "c", "\u2581STOP"]

    def decode(ids: Iterable[int]) -> str:
        return "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    text = StopText(decode, (" STOP",))
    assert [text.push(i, check=True) for i in (0, 1, 2, 3)] == [False, False, False, True]
    assert text.text == "a bc"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab<\u00e9\u65e5\U0001f600"), max_size=12),
    stop=st.text(st.sampled_from("ab<\u00e9\u65e5\U0001f600"), min_size=1, max_size=3),
)
def test_found_where_plain_search_of_the_whole_text_finds_it(text: str, stop: str) -> None:
    found = feed(list(text.encode()), (stop,))
    place = text.find(stop)
    if place < 0:
        assert found is None
    else:
        assert found == (len(text[: place + len(stop)].encode()), text[:place])
