"""`fewbit serve` as a command: it starts, finishes what runs, and says what it needs."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

from fewbit import serving
from fewbit.api import serve as api
from fewbit.errors import PlanError
from fewbit.models.decoding.continuous import Engine
from tests import models
from tests.e2e.conftest import Answer, Fewbit
from tests.limits import HANG
from tests.served import Served, gated, raw, until

pytest.importorskip("fastapi")
run = pytest.importorskip("fewbit.serving.run")
Service = pytest.importorskip("fewbit.serving.service").Service


@pytest.fixture
def during(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Answer, Any]]]:
    """`during(visit, *flags)` is what `fewbit serve tiny` ended with, and what `visit(server)` returned meanwhile."""
    ready, serve, load = queue.SimpleQueue[str | None](), run.run, api.service
    opened: list[Any] = []

    def loaded(*given: Any) -> Any:
        opened.append(load(*given))
        return opened[0]

    def noted(app: Any, at: socket.socket, settings: Any, tell: Callable[[], None], *others: Any) -> None:
        def told() -> None:
            tell()
            ready.put(f"http://127.0.0.1:{at.getsockname()[1]}")

        serve(app, at, settings, told, *others)

    monkeypatch.setattr(api, "service", loaded)
    monkeypatch.setattr(run, "run", noted)
    # The signal of a visit may come when the server has ended.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    # A shell lets what it starts in the background ignore it.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)

    def called(visit: Callable[[Served], Any], *flags: str) -> tuple[Answer, Any]:
        def visited() -> Any:
            address = ready.get(timeout=HANG)
            assert address is not None, "the server did not start"
            try:
                return visit(gated(address, opened[0]))
            finally:
                if opened[0].engine.failed is None:
                    os.kill(os.getpid(), signal.SIGTERM)

        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(visited)
            try:
                done = fewbit("serve", "tiny", "--port", "0", *flags)
            finally:
                ready.put(None)  # nobody reads it, unless the server did not start
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fewbit-engine")]
        return done, told.result()

    yield called
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, interrupt)


def test_a_server_that_does_not_start_ends_its_test(during: Any) -> None:
    with pytest.raises(AssertionError, match="the server did not start"):
        during(lambda server: None, "--kernel", "nope")


def asked(address: str, **body: Any) -> Any:
    """The response to a chat, unread."""
    given = json.dumps({"messages": [{"role": "user", "content": "Hello there"}], "temperature": 0} | body)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer hidden"}
    return urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/chat/completions", given.encode(), headers), timeout=HANG
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_sigterm_finishes_what_runs(during: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_API_KEY", "hidden")

    def visit(server: Served) -> str:
        assert raw(server, "/v1/models")[0] == 401
        # After three steps of 40 nothing is computed until the server has got the signal.
        with server.held(after=3):
            stream = asked(server.address, stream=True, max_tokens=40)
            until(lambda: len(server.steps) == 3)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: not listens(server.address))
        with stream:
            whole = str(stream.read().decode())
        assert len(server.steps) == 40
        return whole

    done, whole = during(visit, "--max-num-seqs", "2")
    assert whole.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in whole
    assert done.code == 0
    assert "Waiting for 1 request to finish. Ctrl-C ends the server at once." in done.err
    assert "Serving tiny: chat at http://127.0.0.1:" in done.err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_the_requests_that_are_waited_for_are_counted(during: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with three answers, and one whose prompt is not yet token ids."""
    read, going, begun = Service._chat, threading.Event(), list[str]()

    def reading(service: Any, chat: Any) -> Any:
        begun.append(chat.messages[0].turn["content"])
        if begun[-1] == "Wait":
            going.wait(HANG)
        return read(service, chat)

    monkeypatch.setattr(Service, "_chat", reading)

    def visit(server: Served) -> None:
        with ThreadPoolExecutor(2) as pool, server.held():
            answers = [pool.submit(asked, server.address, n=3, max_tokens=4)]
            until(lambda: server.service.engine.unfinished == 3)
            messages = [{"role": "user", "content": "Wait"}]
            answers.append(pool.submit(asked, server.address, messages=messages, max_tokens=4))
            until(lambda: "Wait" in begun)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: not listens(server.address))
            going.set()
            server.gate.set()
            for answer in answers:
                with answer.result() as response:
                    assert response.status == 200

    done, _ = during(visit)
    assert done.code == 0
    assert "Waiting for 2 requests to finish." in done.err


async def wait_closed(server: asyncio.Server) -> None:
    """As `Server.wait_closed` of Python 3.12 and later: it waits for all connections. That of 3.11 does not."""
    inside: Any = server
    if inside._waiters is not None:
        inside._waiters.append(asyncio.get_running_loop().create_future())
        await inside._waiters[-1]


@pytest.mark.skipif(os.name == "nt", reason="the signals of Windows are others")
@pytest.mark.parametrize("waits", [False, True])
def test_a_second_interrupt_ends_what_runs(waits: bool, during: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if waits:
        monkeypatch.setattr(asyncio.base_events.Server, "wait_closed", wait_closed)

    def visit(server: Served) -> None:
        with ThreadPoolExecutor(1) as pool, server.held():
            answer = pool.submit(asked, server.address, max_tokens=40)
            until(lambda: server.service.engine.unfinished == 1)
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: not listens(server.address))
            os.kill(os.getpid(), signal.SIGINT)
            assert wait([answer], timeout=30).done  # the gate is closed: a server that waits for it never ends
            with pytest.raises((OSError, http.client.HTTPException)) as refused:
                answer.result()
        if isinstance(refused.value, urllib.error.HTTPError):
            refused.value.close()

    done, _ = during(visit)
    assert done.code == 130
    assert "interrupted" in done.err
    assert "Traceback" not in done.err


def listens(address: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))):
        return True
    return False


def test_a_server_that_cannot_compute_ends(during: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor starts it again."""
    submit = Engine.submit

    def broken(*given: Any, **named: Any) -> None:
        raise RuntimeError("the device is gone")

    def breaking(self: Any, *given: Any, **named: Any) -> str:
        self._manager.model.forward = broken
        return submit(self, *given, **named)

    monkeypatch.setattr(Engine, "submit", breaking)

    def visit(server: Served) -> tuple[int, str]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(server.address)
        with refused.value:
            answer = refused.value.code, refused.value.read().decode()
        until(lambda: server.service.engine.failed is not None)
        return answer

    done, (status, said) = during(visit)
    assert (status, "the device is gone" in said) == (500, True)
    assert done.code == 5
    assert "cannot compute any more: the device is gone" in done.err
    assert "Start the server again" in done.err


def test_a_missing_extra_is_named(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fewbit.serving.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(serving, name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = fewbit("serve", "tiny")
    assert done.code == 2
    assert "uvicorn" in done.err
    assert "pip install 'fewbit[serve]'" in done.err


def test_an_error_ends_the_engine(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise PlanError("no server")

    monkeypatch.setattr("fewbit.serving.run.run", broken)
    before = threading.active_count()
    done = fewbit("serve", "tiny", "--port", "0")
    assert (done.code, "no server" in done.err) == (2, True)
    assert threading.active_count() == before


def test_a_taken_port_is_an_error_before_the_model_is_loaded(fewbit: Fewbit, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = fewbit("serve", "tiny", "--port", taken.getsockname()[1])
    assert done.code == 2
    assert "--port" in done.err
    assert "in use" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-num-seqs", "0"), "--max-num-seqs 0"),
        (("--max-body", "much"), "--max-body 'much'"),
        (("--kernel", "nope"), "unknown kernel"),
        (("--max-model-len", "513"), "--max-model-len 513 is beyond the model's context of 512 tokens"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
    ],
)
def test_bad_flags_are_refused(arguments: tuple[str, ...], words: str, fewbit: Fewbit) -> None:
    done = fewbit("serve", "tiny", "--port", "0", *arguments)
    assert done.code == 2
    assert words in done.err


def test_keys_and_values_beyond_the_memory_are_refused(tmp_path: Path, fewbit: Fewbit) -> None:
    folder = models.save(tmp_path / "model", "llama", max_position_embeddings=2_000_000_000)
    done = fewbit("serve", folder, "--port", "0", "--max-model-len", "2000000000")
    assert (done.code, "are free for them" in done.err) == (2, True), done.err


def test_a_model_that_cannot_be_served_says_why(tmp_path: Path, fewbit: Fewbit) -> None:
    config = MambaConfig(
        vocab_size=models.VOCAB, hidden_size=64, state_size=4, num_hidden_layers=2, dtype="float32", use_mambapy=False
    )
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    done = fewbit("serve", tmp_path / "model", "--port", "0")
    assert done.code == 2
    assert "cannot be served" in done.err
    assert "fewbit generate" in done.err


def test_who_listens_for_all_is_told(fewbit: Fewbit) -> None:
    done = fewbit("serve", "tiny", "--host", "0.0.0.0", "--port", "0", "--max-model-len", "2000000000")
    assert "everyone who reaches 0.0.0.0" in done.err
