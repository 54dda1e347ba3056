"""What a model thinks before it answers: `<think>...</think>`, as Qwen3 and DeepSeek-R1 write it.

DeepSeek's interface, llama-server and vLLM return it as `reasoning_content` beside `content`, and so does this server.
"""

from __future__ import annotations

import math
from typing import Any

from fewbit.serving.text import begun

OPEN, CLOSE = "<think>", "</think>"


def has_marks(tokenizer: Any) -> bool:
    """Whether the model writes thoughts: its chat template or its vocabulary has their marks. Takes milliseconds."""
    template = tokenizer.chat_template
    return CLOSE in (template if isinstance(template, str) else str(template)) or CLOSE in tokenizer.get_vocab()


def opened(prompt: str, continued: str = "") -> bool:
    """Whether the prompt ends inside of thoughts. continued: the message that the answer continues, if any."""
    return prompt.rstrip().endswith(OPEN) or continued.rfind(OPEN) > continued.rfind(CLOSE)


class Thoughts:
    """Splits a text that grows into thoughts and answer. White space around the thoughts is left out."""

    def __init__(self, *, inside: bool) -> None:
        """inside: whether the text begins with thoughts. If not, it does so if it begins with their mark."""
        self._held, self._inside, self._answering, self._said = "", inside, False, False
        self._read, self._end = 0, 0  # characters so far, and where the answer begins

    @property
    def until(self) -> float | None:
        """Where in the text the thoughts end, with their mark; infinity before. None if there may be thoughts."""
        if self._answering:
            return self._end
        return math.inf if self._inside else None

    def add(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """The next thoughts and the next text of the answer. final: nothing more comes."""
        self._held += text
        self._read += len(text)
        if not self._inside and not self._answering:
            begin = self._held.lstrip()
            if begin.startswith(OPEN):
                self._inside, self._held = True, begin.removeprefix(OPEN)
            elif OPEN.startswith(begin) and not final:
                return "", ""
            else:
                self._answering = self._said = True
        thought = self._thought(final) if self._inside else ""
        answer = ""
        if self._answering:
            answer, self._held = self._held if self._said else self._held.lstrip(), ""
            self._said = self._said or bool(answer)
        return thought, answer

    def _thought(self, final: bool) -> str:
        thought, mark, rest = self._held.partition(CLOSE)
        if mark:
            self._inside, self._answering, self._end = False, True, self._read - len(rest)
        elif not final:
            thought = thought[: len(thought) - begun(thought, CLOSE)]
        kept = thought.rstrip()  # white space may be the end
        self._held = rest if mark else self._held[len(kept) :]
        if not self._said:
            kept = kept.lstrip()
        self._said = bool(kept or self._said) and not mark
        return kept
