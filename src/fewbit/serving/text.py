"""Turns tokens into text while they come: no half characters, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what incomplete UTF-8 decodes to


class Written:
    """The text of an answer so far.

    A token may hold a part of a character, and a stop sequence may cross tokens. `add` therefore holds back characters
    that are not complete, and an end that a stop sequence may begin with.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), shown: str | None = None) -> None:
        """shown: a text that has the special tokens that are a part of the answer; None is none."""
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # By id, the special tokens that are not. None is all of them.
        self._skipped: set[int] | None = None
        if shown is not None:
            added = tokenizer.added_tokens_decoder
            self._skipped = {id for id, token in added.items() if token.special and token.content not in shown}
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
        self._tokens.append(token)
        self.starts.append(len(self._text))
        # The text before is decoded too: whether a token begins with a space depends on its predecessor.
        before = self._decoded(self._tokens[self._begin : self._end])
        now = self._decoded(self._tokens[self._begin :])
        if len(now) <= len(before) or now.endswith(_HALF):
            return ""
        self._text += now[len(before) :]
        self._begin, self._end = self._end, len(self._tokens)
        return self._checked(final=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        whole = self._decoded(self._tokens)
        if whole.startswith(self._text):
            self._text = whole
        return self._checked(final=True)

    def _checked(self, *, final: bool) -> str:
        # What was handed out ends before anything that a stop sequence may begin with.
        found = [place for stop in self._stops if (place := self._text.find(stop, self._told)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        until = len(self._text)
        if not final and not self.stopped:
            until -= max((_begun(self._text, stop) for stop in self._stops), default=0)
        piece, self._told = self._text[self._told : until], max(until, self._told)
        return piece

    def _decoded(self, tokens: Sequence[int]) -> str:
        if self._skipped is None:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        kept = [token for token in tokens if token not in self._skipped]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
