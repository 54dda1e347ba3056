"""Turns tokens into text while they come: no half characters, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

_HALF = "\ufffd"  # what incomplete UTF-8 decodes to
_BYTES = 3  # that a character may have when it is not complete


class Written:
    """The text of an answer so far.

    A token may hold a part of a character, and a stop sequence may cross tokens. `add` therefore holds back characters
    that are not complete, and an end that a stop sequence may begin with.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), skipped: Container[int] | None = None, least: int = 0
    ) -> None:
        """skipped: tokens that are no text. None is all special tokens. least: tokens before a stop sequence ends."""
        self._least, self._unstopped = least, 0  # characters of the first `least` tokens
        self._tokenizer, self._stops, self._skipped = tokenizer, tuple(stops), skipped
        self._tokens: list[int] = []
        self._begin = self._end = 0  # tokens of the last piece of text, and the first token whose text is incomplete
        self._text = ""  # decoded so far
        self._told = 0  # characters of it that were handed out
        self.starts: list[int] = []  # where in the text each token begins
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters of the text that was handed out."""
        return self._told

    def add(self, token: int) -> str:
        """The text that may be handed out now. Nothing more comes after `stopped`."""
        self.starts.append(len(self._text))
        if self._skipped is not None and token in self._skipped:
            return ""
        self._tokens.append(token)
        until = len(self._tokens)
        # The text before is decoded too: whether a token begins with a space depends on its predecessor.
        before = self._decoded(self._tokens[self._begin : self._end])
        now = self._decoded(self._tokens[self._begin :])
        if now.endswith(_HALF * (_BYTES + 1)):  # bytes that are no text; only the last ones may become some
            until -= _BYTES
            now = self._decoded(self._tokens[self._begin : until])
        elif now.endswith(_HALF):
            return ""
        if until <= self._end or len(now) <= len(before):
            return ""
        self._text += now[len(before) :]
        self._begin, self._end = self._end, until
        return self._checked(final=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        before = self._decoded(self._tokens[self._begin : self._end])
        self._text += self._decoded(self._tokens[self._begin :])[len(before) :]
        return self._checked(final=True)

    def _checked(self, *, final: bool) -> str:
        if len(self.starts) <= self._least:
            self._unstopped = len(self._text)
        # What was handed out ends before anything that a stop sequence may begin with.
        begins = [(stop, max(self._told, self._unstopped - len(stop) + 1)) for stop in self._stops]
        found = [place for stop, begin in begins if (place := self._text.find(stop, begin)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        until = len(self._text)
        if not final and not self.stopped:
            until -= max((begun(self._text, stop) for stop in self._stops), default=0)
        piece, self._told = self._text[self._told : until], max(until, self._told)
        return piece

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=self._skipped is None))


def begun(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, without being complete."""
    place = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while place >= 0 and not stop.startswith(text[place:]):
        place = text.find(stop[0], place + 1)
    return len(text) - place if place >= 0 else 0
