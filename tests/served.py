"""A server in a thread of the test, whose steps can be held up and are counted."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.models.loading import Loading
from tests.limits import HANG

HELLO = [{"role": "user", "content": "Hello there"}]
PROMPTS = ["Hello there", "What is a garden?", "Tell me a story about a cat.", "Why is the sky blue?", "One two three"]


@dataclass
class Served:
    """A server. steps: the tokens of each forward pass. gate: while it is cleared, no step is computed.

    last: the number of the step after which the gate closes, if any.
    """

    address: str
    service: Any
    gate: threading.Event
    steps: list[int] = field(default_factory=list)
    last: int | None = None
    connections: Any = ()
    stop: Callable[[], None] = lambda: None  # ends the server

    @contextlib.contextmanager
    def client(self, **settings: Any) -> Iterator[Any]:
        """OpenAI's own client."""
        openai = pytest.importorskip("openai")
        given = {"api_key": "none", "max_retries": 0, "timeout": HANG} | settings
        with openai.OpenAI(base_url=f"{self.address}/v1", **given) as made:
            yield made

    @contextlib.contextmanager
    def held(self, after: int = 0) -> Iterator[None]:
        """Inside this context no step begins after the next `after` ones."""
        if after:
            self.last = len(self.steps) + after
        else:
            self.gate.clear()
        try:
            yield
        finally:
            self.last = None
            self.gate.set()


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    end = threading.Event()
    for _ in range(int(HANG / 0.01)):
        if condition():
            return
        end.wait(0.01)
    raise AssertionError("it did not happen")


@contextlib.contextmanager
def served(model: str | Path, *, exact: bool = False, **settings: Any) -> Iterator[Served]:
    """Serve `model` in float32 on a free port of this machine. exact: kernels do not round activations."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from fewbit.api.serve import service
    from fewbit.serving import run, sockets
    from fewbit.serving.app import application
    from fewbit.serving.settings import Serving

    given = Serving(port=0, **settings)
    with pytest.MonkeyPatch.context() as patch:
        if not exact:
            patch.delenv("FEWBIT_ACTIVATIONS", raising=False)  # tests/conftest.py sets it
        opened = service(model, Loading("cpu", "float32"), given)
    with sockets.bound(given.host, 0) as socket:
        made = gated(f"http://127.0.0.1:{socket.getsockname()[1]}", opened)
        app = application(opened, given)
        server = uvicorn.Server(run.configuration(app, given))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})

        def stop() -> None:
            made.gate.set()
            server.should_exit = True
            thread.join(HANG)
            assert not thread.is_alive()

        made.connections, made.stop = server.server_state.connections, stop
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            yield made
        finally:
            stop()


def gated(address: str, service: Any) -> Served:
    """The server of this service at this address, whose steps can be held up from now on."""
    made, engine = Served(address, service, threading.Event()), service.engine
    made.gate.set()
    model, single = engine._manager.model, engine._single
    forward, logits = model.forward, single.logits

    def begin(tokens: int) -> None:
        torch.set_num_threads(1)
        made.gate.wait(HANG)
        if len(made.steps) + 1 == made.last:
            made.gate.clear()
        made.steps.append(tokens)

    @functools.wraps(forward)
    def gated_forward(*args: Any, **kwargs: Any) -> Any:
        begin(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    def gated_logits(*args: Any) -> Any:
        begin(1)
        return logits(*args)

    model.forward, single.logits = gated_forward, gated_logits
    return made


def demo(out: Path) -> Path:
    """The demo model in four bits, whose answers end only at their maximum of tokens."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "another process does the same work")  # another file's tests, with -n
        fewbit.quantize("tiny", out, plan="rtn-4bit")
    return _set_ends(out, None)


def with_ends(model: Path, out: Path, ends: int | list[int]) -> Path:
    """A copy of a model whose answers end at these tokens."""
    shutil.copytree(model, out)
    return _set_ends(out, ends)


def _set_ends(model: Path, ends: Any) -> Path:
    place = model / "generation_config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps(config | {"eos_token_id": ends}), encoding="utf-8")
    return model


def ask(client: Any, prompt: str = "Hello there", new: int | None = 8, **more: Any) -> Any:
    """A greedy answer in a chat."""
    messages = [{"role": "user", "content": prompt}]
    given = {"model": "tiny-4bit", "max_tokens": new, "temperature": 0} | more
    return client.chat.completions.create(messages=messages, **given)


def said(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def raw(server: Served, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of an answer to a request that OpenAI's client would not send."""
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.address + path, body, given)) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read()
    return status, json.loads(text)


class _Script:
    """A grammar of one text."""

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self._tokens, self._vocabulary, self._place = tokens, vocabulary, 0

    @property
    def complete(self) -> bool:
        return self._place == len(self._tokens)

    def allowed(self) -> bytes:
        mask = bytearray(self._vocabulary)
        mask[self._tokens[self._place]] = 200
        return bytes(mask)

    def accept(self, token: int) -> None:
        assert token == self._tokens[self._place]
        self._place += 1

    def copy(self) -> _Script:
        return _Script(self._tokens, self._vocabulary)


def scripted(server: Served, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make all answers of the server that text."""
    tokenizer = server.service.tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]

    async def grammar(asked: Any) -> Any:
        return _Script(tokens, len(tokenizer))

    monkeypatch.setattr(server.service, "grammar", grammar)
