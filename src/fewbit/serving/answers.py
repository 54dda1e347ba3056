"""The JSON of answers, whole and in pieces, as OpenAI's interface has it."""

from __future__ import annotations

import secrets
import string
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fewbit.models.decoding.calls import Call
from fewbit.models.decoding.choosing import Likely
from fewbit.serving.asked import Chat, Completion
from fewbit.serving.service import Answers, Piece, Prompt, Service


class Form:
    """The JSON of one answer."""

    def __init__(self, service: Service, asked: Chat | Completion, prompts: Sequence[Prompt]) -> None:
        self._service, self._asked = service, asked
        self._chat = isinstance(asked, Chat)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        # What each answer begins with. The pieces have it themselves if it comes with log probabilities.
        echo = isinstance(asked, Completion) and asked.echo and not asked.scored
        self._echo = [prompt.text if echo else "" for prompt in prompts for _ in range(asked.n)]
        self._calls = Counter[int]()  # of each answer so far

    def whole(self, pieces: list[tuple[int, Piece]], answer: Answers) -> dict[str, Any]:
        """The body of answers that are not streamed."""
        choices = [
            self._whole(choice, [piece for index, piece in pieces if index == choice])
            for choice in range(len(self._echo))
        ]
        return self._object("chat.completion" if self._chat else "text_completion", choices, usage(answer))

    def _whole(self, choice: int, pieces: list[Piece]) -> dict[str, Any]:
        text = self._echo[choice] + "".join(piece.text for piece in pieces)
        likely = [each for piece in pieces for each in piece.likely]
        said: dict[str, Any] = {"text": text}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls := [_call(call) for piece in pieces for call in piece.calls]:
                message |= {"content": text or None, "tool_calls": calls}
            if thought := "".join(piece.thought for piece in pieces):
                message["reasoning_content"] = thought
            said = {"message": message}
        return self._choice(choice, said, likely, pieces[-1].finish)

    def begin(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        said: list[dict[str, Any]]
        if self._chat:
            said = [{"delta": {"role": "assistant", "content": "", "refusal": None}}] * len(self._echo)
        else:
            said = [{"text": text} for text in self._echo if text]  # all prompts or none
        return [self._chunk([self._choice(choice, each, [], None)]) for choice, each in enumerate(said)]

    def piece(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        """A piece of a stream. Its end has a chunk of its own in a chat, as OpenAI does it."""
        if not self._chat:
            return [self._chunk([self._choice(choice, {"text": piece.text}, piece.likely, piece.finish)])]
        chunks, thinking, likely = [], piece.likely[: piece.thinking], piece.likely[piece.thinking :]
        if piece.thought or thinking:
            delta: dict[str, Any] = {"reasoning_content": piece.thought}
            chunks.append(self._chunk([self._choice(choice, {"delta": delta}, thinking, None)]))
        if piece.text or likely:
            chunks.append(self._chunk([self._choice(choice, {"delta": {"content": piece.text}}, likely, None)]))
        for call in piece.calls:
            delta = {"tool_calls": [{"index": self._calls[choice], **_call(call)}]}
            chunks.append(self._chunk([self._choice(choice, {"delta": delta}, [], None)]))
            self._calls[choice] += 1
        if piece.finish:
            chunks.append(self._chunk([self._choice(choice, {"delta": {}}, [], piece.finish)]))
        return chunks

    def end(self, answer: Answers) -> list[dict[str, Any]]:
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

    def _choice(
        self, choice: int, said: dict[str, Any], likely: Iterable[tuple[int, Likely]], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._asked.shown is not None:
            logprobs = self._of_chat(likely) if self._chat else self._of_completion(likely)
        return {"index": choice, **said, "logprobs": logprobs, "finish_reason": finish}

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
            "top_logprobs": [None if one.logprob is None else self._top(one) for _, one in listed],
            "text_offset": [start for start, _ in listed],
        }

    def _top(self, one: Likely) -> dict[str, float]:
        return {self._text(token): value for token, value in reversed(one.top)}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self._service.tokenizer.decode([token]))


def _call(call: Call) -> dict[str, Any]:
    # Nine letters and digits: Mistral's chat template takes no other ids.
    made = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return {"id": made, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage(answer: Answers) -> dict[str, int]:
    """The tokens of a request."""
    prompt, new = answer.prompt_tokens, answer.tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def model(service: Service) -> dict[str, Any]:
    """The model as /v1/models lists it. `max_model_len` is vLLM's name for the context."""
    made = {"id": service.name, "object": "model", "created": service.since, "owned_by": "fewbit"}
    return made | {"max_model_len": service.engine.context}
