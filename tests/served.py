"""A server in a thread of the test, whose steps can be held up and are counted."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.models.loading import Loading
from tests.limits import HANG


@dataclass
class Served:
    """A server. steps: the tokens of each forward pass. gate: while it is cleared, no step is computed."""

    address: str
    service: Any
    gate: threading.Event
    steps: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def client(self, **settings: Any) -> Iterator[Any]:
        """OpenAI's own client."""
        openai = pytest.importorskip("openai")
        given = {"api_key": "none", "max_retries": 0, "timeout": HANG} | settings
        with openai.OpenAI(base_url=f"{self.address}/v1", **given) as made:
            yield made

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside this context no step begins."""
        self.gate.clear()
        try:
            yield
        finally:
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
def served(model: str | Path, kernel: str | None = None, **settings: Any) -> Iterator[Served]:
    """Serve `model` in float32 on a free port of this machine."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from fewbit.api.serve import service
    from fewbit.serving import run
    from fewbit.serving.app import application
    from fewbit.serving.settings import Serving

    given = Serving(port=0, **settings)
    opened = service(model, Loading("cpu", "float32", kernel), given)
    gate = threading.Event()
    gate.set()
    with run.bound(given.host, 0) as socket:
        made = Served(f"http://127.0.0.1:{socket.getsockname()[1]}", opened, gate)
        _gated(opened.engine, made)
        app = application(opened, given.api_key, int(given.max_body))
        server = uvicorn.Server(run.configuration(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            yield made
        finally:
            gate.set()
            server.should_exit = True
            thread.join(HANG)
            assert not thread.is_alive()


def _gated(engine: Any, made: Served) -> None:
    model = engine._manager.model
    forward = model.forward

    @functools.wraps(forward)
    def gated(*args: Any, **kwargs: Any) -> Any:
        torch.set_num_threads(1)
        made.gate.wait(HANG)
        made.steps.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    model.forward = gated
