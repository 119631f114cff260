"""Stop strings over a token stream: they may span tokens, and tokens may split a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""What a decoder puts for bytes that are not, or not yet, a character."""


class StopText:
    """The text of one growing sequence, decoded a few tokens at a time, searched for stop strings.

    Tokens are decoded together with those of the last committed piece, because a token's text may depend
    on the one before (SentencePiece drops the first space). A piece is committed when it does not end in
    the middle of a character.
    """

    __slots__ = ("_decode", "_floor", "_pending", "_recent", "_shown", "_stops", "text")

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: tuple[str, ...]) -> None:
        self._decode = decode
        self._stops = stops
        self._recent: list[int] = []
        self._shown = 0
        self._pending: list[int] = []
        self._floor = 0
        self.text = ""
        """Committed so far; after `push` returned True, cut before the stop string."""

    def push(self, token_id: int, *, check: bool) -> bool:
        """Take one token; True when a stop string is complete. Unchecked text never counts as one."""
        self._pending.append(token_id)
        fresh = self._decode([*self._recent, *self._pending])[self._shown :]
        whole = fresh.rstrip(BROKEN)
        if check:
            place = self._find(self.text + whole)
            if place is not None:
                self.text = (self.text + whole)[:place]
                return True
        else:
            self._floor = len(self.text) + len(whole)
        if fresh and not fresh.endswith(BROKEN):
            self.text += fresh
            self._recent, self._pending = self._pending, []
            self._shown = len(self._decode(self._recent))
        return False

    def _find(self, text: str) -> int | None:
        """Where the first stop string starts that ends in text not searched before."""
        places = []
        for stop in self._stops:
            # Whatever ended before the committed text's end was found when that text came.
            start = max(len(self.text), self._floor) - len(stop) + 1
            place = text.find(stop, max(start, 0))
            if place >= 0:
                places.append(place)
        return min(places, default=None)
