"""The JSON of answers, whole and in pieces, as OpenAI's interface has it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from fewbit.models.decoding.continuous import Likely
from fewbit.serving.asked import Chat, Completion
from fewbit.serving.service import Answer, Piece, Service


class Form:
    """The JSON of one answer."""

    def __init__(self, service: Service, asked: Chat | Completion) -> None:
        self._service, self._asked = service, asked
        self._chat = isinstance(asked, Chat)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, pieces: list[Piece], answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = "".join(piece.text for piece in pieces)
        likely = [each for piece in pieces for each in piece.likely]
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = self._choice(said if self._chat else {"text": text}, likely, pieces[-1].finish)
        return self._object("chat.completion" if self._chat else "text_completion", [choice], usage(answer))

    def begin(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        if not self._chat:
            return []
        return [self._chunk([self._choice({"delta": {"role": "assistant", "content": "", "refusal": None}}, [], None)])]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece of a stream. Its end has a chunk of its own in a chat, as OpenAI does it."""
        if not self._chat:
            return [self._chunk([self._choice({"text": piece.text}, piece.likely, piece.finish)])]
        chunks = []
        if piece.text or piece.likely:
            chunks.append(self._chunk([self._choice({"delta": {"content": piece.text}}, piece.likely, None)]))
        if piece.finish:
            chunks.append(self._chunk([self._choice({"delta": {}}, [], piece.finish)]))
        return chunks

    def end(self, answer: Answer) -> list[dict[str, Any]]:
        """What a stream ends with: its tokens, if the client asked for them."""
        options = self._asked.stream_options
        if options is None or not options.include_usage:
            return []
        return [self._chunk([]) | {"usage": usage(answer)}]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        options = self._asked.stream_options
        empty = {"usage": None} if options is not None and options.include_usage else {}
        return self._object("chat.completion.chunk" if self._chat else "text_completion", choices) | empty

    def _object(self, kind: str, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
        made = {"id": self._id, "object": kind, "created": self._created, "model": self._service.name}
        return {**made, "choices": choices} | ({} if used is None else {"usage": used})

    def _choice(self, said: dict[str, Any], likely: Iterable[tuple[int, Likely]], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self._asked.shown is not None:
            logprobs = self._of_chat(likely) if self._chat else self._of_completion(likely)
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}

    def _of_chat(self, likely: Iterable[tuple[int, Likely]]) -> dict[str, Any]:
        return {
            "content": [
                self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*each) for each in one.top]}
                for _, one in likely
            ],
            "refusal": None,
        }

    def _of_completion(self, likely: Iterable[tuple[int, Likely]]) -> dict[str, Any]:
        listed = list(likely)
        return {
            "tokens": [self._text(one.token) for _, one in listed],
            "token_logprobs": [one.logprob for _, one in listed],
            "top_logprobs": [{self._text(token): value for token, value in reversed(one.top)} for _, one in listed],
            "text_offset": [start for start, _ in listed],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self._service.tokenizer.decode([token]))


def usage(answer: Answer) -> dict[str, int]:
    """The tokens of a request."""
    prompt, new = answer.prompt_tokens, answer.tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def model(service: Service) -> dict[str, Any]:
    """The model as /v1/models lists it. `max_model_len` is vLLM's name for the context."""
    made = {"id": service.name, "object": "model", "created": service.since, "owned_by": "fewbit"}
    return made | {"max_model_len": service.engine.context}
