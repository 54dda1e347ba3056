"""Answers checked requests: prompts become token ids, and tokens become pieces of text."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fewbit.errors import FewbitError, KernelError, PlanError
from fewbit.models.decoding.calls import Call, in_template_with_tools
from fewbit.models.decoding.choosing import Choosing, Likely
from fewbit.models.decoding.continuous import Engine, News
from fewbit.models.decoding.generate import in_template, prompt_ids
from fewbit.serving import template
from fewbit.serving.asked import Chat, Completion
from fewbit.serving.failures import Failure
from fewbit.serving.grammar import Grammar, Grammars
from fewbit.serving.metrics import Metrics
from fewbit.serving.reading import reader
from fewbit.serving.text import Written
from fewbit.serving.thoughts import CLOSE, OPEN, Thoughts, has_marks, opened
from fewbit.system.files import unwritable
from fewbit.texts import windows
from fewbit.units import counted

_TOGETHER = 32  # tokens of an answer that is sent whole, after which their text is looked at
_PAUSE = 0.005  # seconds between the pieces of a stream at least; the first comes at once


@dataclass(frozen=True)
class Piece:
    """The next text of an answer. likely: of the tokens that begin in it, each with its place in the whole text.

    finish: why the answer ends here, "stop", "length" or "tool_calls". calls: of functions. thought: what comes
    before the text. thinking: how many of `likely` are tokens of the thoughts and their marks.
    """

    text: str
    likely: tuple[tuple[int, Likely], ...]
    finish: str | None
    calls: tuple[Call, ...] = ()
    thought: str = ""
    thinking: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt. text: as the client gave it, or of its token ids if they are echoed. opened: it begins thoughts."""

    ids: list[int]
    text: str = ""
    opened: bool = False


class Service:
    """One model with its tokenizer, and the limits of the server."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str, usual: Choosing, rows: int | None, most: int) -> None:
        """usual: sampling where a request says nothing. rows: of the embedding. most: requests that run or wait."""
        self.engine, self.tokenizer, self.name, self.usual, self.most = engine, tokenizer, name, usual, most
        self.since = int(time.time())
        self.metrics = Metrics(lambda: engine.unfinished)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special: dict[int, str] = {id: token.content for id, token in added.items() if token.special}
        self._rows, self._thinks = rows, has_marks(tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "fewbit-tokenizer")  # tokenizers are not for several threads at once
        self._compiling = ThreadPoolExecutor(1, "fewbit-grammar")  # a large schema holds up others with a schema only
        self._grammars = Grammars(tokenizer, engine.ends, rows)

    def check(self, model: str | None) -> None:
        """Failure if a request names another model."""
        if model is not None and model != self.name:
            raise Failure(404, f"The model `{model}` does not exist. This server has `{self.name}`.", "model_not_found")

    def thinks(self, asked: Chat | Completion) -> bool:
        """Whether the answer may begin with thoughts. One in JSON has none: its grammar allows no other text."""
        return self._thinks and isinstance(asked, Chat) and asked.schema_ is None

    async def prompts(self, asked: Chat | Completion) -> list[Prompt]:
        """The prompts of a request. Failure if one is invalid or too long."""
        param = "messages" if isinstance(asked, Chat) else "prompt"
        last = (self._rows or 2**31) - 1
        if any(int(token) > last for token in asked.logit_bias):
            raise Failure(400, f"logit_bias: token ids go from 0 to {last}", "invalid_value", "logit_bias")
        self._check_number(asked)
        makes: list[Callable[[], Prompt]]
        if isinstance(asked, Chat):
            makes = [lambda: self._chat(asked)]
        else:
            makes = [partial(self._prompt, given, asked.echo) for given in asked.prompt]
        prompts = []
        for make in makes:  # one at a time, so that other requests come in between
            try:
                prompts.append(await asyncio.get_running_loop().run_in_executor(self._tokenizing, make))
            except FewbitError as error:
                raise Failure(400, error.message.replace("`", ""), "invalid_value", param) from error
            self._check_room(len(prompts[-1].ids), asked.new or asked.min_tokens or None, param)
        return prompts

    def _check_room(self, tokens: int, new: int | None, param: str) -> None:
        context = self.engine.context
        if context - tokens < (1 if new is None else new):
            more = f" With {counted(new, 'new token')} it" if new else " It"
            said = f"The prompt has {counted(tokens, 'token')}.{more} exceeds the context of {context:,} tokens."
            raise Failure(400, said, "context_length_exceeded", param)

    def _check_number(self, asked: Chat | Completion) -> None:
        """Failure if a request has more answers than this server ever takes."""
        if asked.answers > self.most:
            prompts = asked.answers > asked.n
            what, param = ("prompts times n", "prompt") if prompts else ("n", "n")
            said = f"{what}: this server takes up to {self.most} answers at once"
            raise Failure(400, said, "invalid_value", param)

    async def grammar(self, asked: Chat | Completion) -> Grammar | None:
        """What limits the answer to JSON, if the request asks for it. Failure for a schema that cannot be followed."""
        if not isinstance(asked, Chat) or (stated := asked.schema_) is None:
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, self._grammars.of, stated[1])
        except FewbitError as error:
            raise Failure(400, f"{stated[0]}: {error.message}", "invalid_json_schema", stated[0]) from error

    def _chat(self, asked: Chat) -> Prompt:
        turns = [message.turn for message in asked.messages]
        for turn in turns:
            if reason := unwritable(turn["content"]):
                raise Failure(400, f"messages: {reason}", "invalid_value", "messages")
        if not self.tokenizer.chat_template:
            raise Failure(400, "This model has no chat template: use /v1/completions.", "no_chat_template", "messages")
        text = self._in_template(asked, turns)
        if reason := unwritable(text):
            raise Failure(400, f"messages or tools: {reason}", "invalid_value", "tools" if asked.tools else "messages")
        self._check_length(text, "messages")
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        continued = turns[-1]["content"] if asked.continue_final_message else ""
        return Prompt(self._within(ids["input_ids"].long(), "messages"), opened=opened(text, continued))

    def _in_template(self, asked: Chat, turns: Sequence[dict[str, Any]]) -> str:
        options = template.options(asked, self.tokenizer)
        if asked.offered:
            try:
                text = in_template_with_tools(self.tokenizer, turns, asked.offered, options)
            except PlanError as error:
                raise Failure(400, f"tools: {error.message}", "unsupported_parameter", "tools") from error
        else:
            text = in_template(self.tokenizer, turns, options=options)
        called = {call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())}
        if lost := sorted(name for name in called if name not in text):
            message = f"messages: this model's chat template leaves out the calls of {', '.join(lost)}"
            raise Failure(400, message, "unsupported_parameter", "messages")
        return text

    def _prompt(self, given: str | list[int], echo: bool) -> Prompt:
        """echo: whether the prompt's text is needed."""
        if isinstance(given, str):
            self._check_length(given, "prompt")
            return Prompt(self._within(prompt_ids(self.tokenizer, given), "prompt"), given)
        if not 0 <= min(given) <= max(given) < (self._rows or 2**31):
            raise Failure(400, f"prompt: token ids go from 0 to {(self._rows or 2**31) - 1}", "invalid_value", "prompt")
        return Prompt(given, str(self.tokenizer.decode(given)) if echo else "")

    def _check_length(self, text: str, param: str) -> None:
        """Failure if the begin of a long text is already far beyond the context: not all of it needs to be read."""
        context = self.engine.context
        if len(text) <= 16 * context + 10_000:
            return
        begin = self.tokenizer(text[: 8 * context], add_special_tokens=False)["input_ids"]
        if len(begin) > context * 1.1 + 16:  # the cut may change a few tokens
            said = f"The prompt exceeds the context of {context:,} tokens."
            raise Failure(400, said, "context_length_exceeded", param)

    def _within(self, ids: Tensor, where: str) -> list[int]:
        listed: list[int] = windows.within(ids, self._rows, self.tokenizer, where)[0].tolist()
        return listed

    def begin(self, prompts: Sequence[Prompt], asked: Chat | Completion, grammar: Grammar | None) -> Answers:
        """Put a request in the queue. Failure if the queue is full or the engine has ended."""
        if self.engine.failed:
            raise Failure(503, "The engine has ended by an error, and the server ends.", "engine_failed")
        if self.engine.unfinished + asked.answers > self.most:
            raise Failure(429, "The queue is full. Try again later.", "queue_full", headers={"Retry-After": "1"})
        return Answers(self, prompts, asked, grammar)


class Answers:
    """The `n` answers to each prompt of a request, which run. `close` ends them; it must be called.

    Answer i to prompt p has the index p * n + i.
    """

    def __init__(
        self, service: Service, prompts: Sequence[Prompt], asked: Chat | Completion, grammar: Grammar | None
    ) -> None:
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._came, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._told, self._pause = False, _PAUSE if asked.stream else 0.0
        self._all = list[Answer]()
        try:
            for prompt in prompts:
                for choice in range(asked.n):
                    follows = None if grammar is None else grammar.copy()
                    self._all.append(Answer(service, prompt, asked, choice, follows, self._tell))
        except BaseException:
            self.close()
            raise
        service.metrics.prompt_tokens += self.prompt_tokens

    @property
    def tokens(self) -> int:
        """The tokens of all answers so far."""
        return sum(answer.tokens for answer in self._all)

    def _tell(self) -> None:
        if self._told:  # the event loop is woken already
            return
        self._told = True
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._came.set)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The answers, piece by piece, each with its index. Its last one has `finish`. Failure if the engine fails."""
        running, last = dict(enumerate(self._all)), -math.inf
        while running:
            await self._came.wait()
            if (early := last + self._pause - self._loop.time()) > 0:
                await asyncio.sleep(early)
            self._came.clear()
            # Before the new tokens are read: one that comes meanwhile wakes the event loop again.
            self._told, last = False, self._loop.time()
            for choice, answer in list(running.items()):
                piece = answer.piece()
                if piece.finish:
                    answer.close()
                    del running[choice]
                if piece.text or piece.likely or piece.calls or piece.thought or piece.finish:
                    yield choice, piece

    def close(self) -> None:
        """End those that have not ended."""
        for answer in self._all:
            answer.close()


class Answer:
    """One answer that runs."""

    def __init__(
        self,
        service: Service,
        prompt: Prompt,
        asked: Chat | Completion,
        choice: int,
        grammar: Grammar | None,
        tell: Callable[[], None],
    ) -> None:
        """choice: its index among the answers to the prompt. tell: is called when there is something new."""
        self.tokens, self._service = 0, service
        self._reader, shown = reader(service.tokenizer, asked)
        self._thoughts = Thoughts(inside=prompt.opened) if service.thinks(asked) else None
        self._undecided: tuple[tuple[int, Likely], ...] = ()  # those of tokens that may begin thoughts
        if self._thoughts is not None:
            shown = (shown or "") + OPEN + CLOSE
        skipped = {token for token, text in service.special.items() if shown is None or text not in shown}
        self._written = Written(service.tokenizer, asked.stops, skipped, asked.min_tokens)
        stops = {token for token, text in service.special.items() if text in asked.stops}
        self._ends, self._least = stops.union(() if asked.ignore_eos else service.engine.ends), asked.min_tokens
        self._news, self._changed = News((), False), tell
        self._begun, self._closed = time.perf_counter(), False
        self._reported, self._called = 0, False
        self._one_function = isinstance(asked, Chat) and asked.one_function is not None
        self._prompt, self._scored = prompt, asked.scored
        self._shift, self._most = len(prompt.text) if asked.scored else 0, asked.new
        # Each time that the event loop is woken up, the engine waits for it: both are threads of one interpreter.
        self._step, self._next = 1 if asked.stream or asked.stops else _TOGETHER, 1
        new = service.engine.context - len(prompt.ids) if asked.new is None else max(asked.new, 1)
        choosing = asked.choosing(service.usual, choice)
        try:
            self._name = service.engine.submit(prompt.ids, new, choosing, self._tell, grammar, asked.scored)
        except KernelError as error:
            self._closed = True
            message = "The server takes no requests now: it shuts down, or starts again after an error."
            raise Failure(503, message, "unavailable", headers={"Retry-After": "1"}) from error

    def _tell(self, news: News) -> None:
        self._news = news
        if news.finished or news.error or news.complete or len(news.tokens) >= self._next:
            self._next = len(news.tokens) + self._step
            self._changed()

    def piece(self) -> Piece:
        """What is new; it may be nothing. Failure if the engine fails."""
        news = self._news
        if news.error:
            raise Failure(500, f"The engine failed: {news.error}", "engine_failed")
        if news.tokens and not self.tokens:
            self._service.metrics.first_token.add(time.perf_counter() - self._begun)
        if news.tokens and self._most == 0:  # only the prompt's scores are wanted, which are known now
            begin, likely = self._begin(news)
            return self._read(begin, likely, "length")
        written, ended, text = self._written, False, ""
        begin, scores = self._begin(news) if news.tokens and not self.tokens else ("", ())
        for token in news.tokens[self.tokens :]:
            self.tokens += 1
            self._service.metrics.generated_tokens += 1
            ended = token in self._ends and self.tokens > self._least
            if self._scored and ended:
                written.starts.append(written.length)  # who adds up a prompt's scores counts on one token more
            text += "" if ended else written.add(token)
            if ended or written.stopped:
                break
        finish = None
        ended = ended or news.complete
        if ended or news.finished:
            text += written.finish()
            finish = "stop" if ended or written.stopped else "length"
        elif written.stopped:
            finish = "stop"
        found = []
        for one, start in zip(news.likely[self._reported :], written.starts[self._reported :], strict=False):
            if start >= written.length and not (self._scored and one.token in self._ends):
                break
            found.append((self._shift + start, one))
        self._reported += len(found)
        return self._read(begin + text, (*scores, *found), finish)

    def _begin(self, news: News) -> tuple[str, tuple[tuple[int, Likely], ...]]:
        """The prompt's text and its tokens' log probabilities, if both are asked for."""
        if not self._scored:
            return "", ()
        read, text = Written(self._service.tokenizer, skipped=()), self._prompt.text
        whole = "".join(read.add(token) for token in self._prompt.ids) + read.finish()
        before = len(whole) - len(text)  # characters of tokens that the tokenizer puts before a text
        return text, tuple((max(at - before, 0), one) for at, one in zip(read.starts, news.prompt, strict=True))

    def _read(self, text: str, likely: tuple[tuple[int, Likely], ...], finish: str | None) -> Piece:
        thought, thinking = "", 0
        if self._thoughts is not None:
            thought, text = self._thoughts.add(text, final=finish is not None)
            likely, until = (*self._undecided, *likely), self._thoughts.until
            self._undecided = likely if until is None else ()
            likely = () if until is None else likely
            thinking = 0 if until is None else sum(start < until for start, _ in likely)
        text, calls = self._reader.add(text)
        if finish:
            rest, more = self._reader.finish()
            text, calls = text + rest, calls + more
            self._service.metrics.whole.add(time.perf_counter() - self._begun)
        self._called = self._called or bool(calls)
        # As OpenAI: the answer whose function the request has named says "stop".
        if self._called and finish == "stop" and not self._one_function:
            finish = "tool_calls"
        return Piece(text, likely, finish, tuple(calls), thought, thinking)

    def close(self) -> None:
        """End it, if it has not ended."""
        if not self._closed:
            self._closed = True
            self._service.engine.cancel(self._name)
