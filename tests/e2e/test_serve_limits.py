"""What a client can do to the server: large, deep and slow requests, and names of other sites."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.limits import HANG
from tests.served import HELLO, Served, ask, raw, said, served, until

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")


def _socket(server: Served) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])))
    made.settimeout(HANG)
    return made


def _deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"{}" + b"}" * levels


CHAT = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1,'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", b"[" * 10**5),
        ("chat/completions", CHAT + b'"metadata":' + _deep(5000) + b"}"),
        (
            "chat/completions",
            CHAT + b'"tools":[{"type":"function","function":{"name":"f","parameters":' + _deep(900) + b"}}]}",
        ),
        ("chat/completions", CHAT + b'"seed":' + b"9" * 5000 + b"}"),
        ("chat/completions", CHAT + b'"temperature":NaN}'),
        ("chat/completions", b'{"messages":[{"role":"user","content":"\xff"}]}'),
        ("completions", b'{"prompt":[1,1.5]}'),
        ("completions", b'{"prompt":[1,true]}'),
        ("completions", b'{"prompt":[[1,"a"]]}'),
        ("completions", b'{"prompt":{}}'),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_bodies_that_are_refused(path: str, body: bytes, server: Served) -> None:
    status, answer = raw(server, f"/v1/{path}", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        (b'"stop":[1]', "stop.0"),
        (b'"stop":1', "stop"),
        (b'"tool_choice":"x"', "tool_choice"),
        (b'"response_format":{}', "response_format.type"),
        (b'"messages":[{"role":"user","content":[{"type":"text"}]}]', "messages.0.content.0.text"),
        (b'"messages":[{"content":"hi"}]', "messages.0.role"),
    ],
)
def test_an_error_names_the_place_as_the_client_wrote_it(fields: bytes, where: str, server: Served) -> None:
    """A value of several types has a place for each type in pydantic's error, such as stop.constrained-str."""
    status, answer = raw(server, "/v1/chat/completions", CHAT + fields + b"}")
    assert status == 400
    assert answer["error"]["message"].split(": ")[0] == where
    assert answer["error"]["param"] == where.split(".")[0]


def test_long_lists_are_checked_up_to_their_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of pydantic takes a minute for two million errors."""
    from pydantic import ValidationError

    from fewbit.serving.asked import Chat, Completion
    from fewbit.serving.failures import Failure

    for name in ("messages", "tools"):
        with pytest.raises(ValidationError) as caught:
            Chat.model_validate({"messages": HELLO, name: [1] * 100})
        assert caught.value.error_count() == 1
    parts = [{"role": "user", "content": [{"type": "text"}] * 100}]
    with pytest.raises(ValidationError) as caught:
        Chat.model_validate({"messages": parts})
    assert caught.value.error_count() <= 2
    with pytest.raises(ValidationError) as caught:
        Chat.model_validate({"messages": HELLO, "logit_bias": {str(i): 1 for i in range(2000)}})
    assert caught.value.error_count() == 1
    for prompt in ([1] * 100 + ["a"], [[1] * 100 + [None]], [1.5] * 100):
        with pytest.raises(Failure, match="token ids"):
            Completion.model_validate({"prompt": prompt})


def test_a_prompt_far_beyond_the_context_is_not_read(server: Served) -> None:
    lengths, tokenizer = [], server.service.tokenizer

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **more: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **more)

    server.service.tokenizer = Spy()
    try:
        for path, body in (
            ("completions", {"prompt": "Hello wor1d. " * 10**4}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a" * 10**5}]}),
        ):
            status, answer = raw(server, f"/v1/{path}", json.dumps(body).encode())
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    finally:
        server.service.tokenizer = tokenizer
    assert max(lengths) <= 8 * 512


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", b"403"),
        ("evil.example:80", b"403"),
        ("localhost.evil.example", b"403"),
        ("127.0.0.1.evil.example", b"403"),
        ("localhost:8000", b"200"),
        ("LOCALHOST", b"200"),
        ("app.localhost", b"200"),
        ("127.0.0.1:1", b"200"),
        ("[::1]:8000", b"200"),
        ("192.168.0.7", b"200"),
    ],
)
def test_names_of_other_sites_are_refused(host: str, status: bytes, server: Served) -> None:
    """DNS rebinding. An address has no name that another site could have."""
    for path in ("/v1/models", "/health", "/"):
        with _socket(server) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert client.recv(12) == b"HTTP/1.1 " + status


def test_with_a_key_any_name_is_right(quantized: Path) -> None:
    with served(quantized, api_key="secret") as server, _socket(server) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: my.example\r\nAuthorization: Bearer secret\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"


def test_slow_clients_are_cut_off(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.serving.connections import Connection
    from fewbit.serving.guard import Guard

    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served(quantized) as server:
        with _socket(server) as client:
            for _ in range(2):
                client.sendall(request)
                answer = b""
                while b'{"status":"ok"}' not in answer:
                    answer += client.recv(1000)
                monkeypatch.setattr(Connection, "head_seconds", 0.1)
                time.sleep(0.2)  # idle is not slow
            client.sendall(b"GET /hea")
            assert client.recv(100) == b""
        for begin in (b"", b"GET /health HTTP/1.1\r\nHo"):
            with _socket(server) as client:
                client.sendall(begin)
                assert client.recv(100) == b""
        monkeypatch.setattr(Connection, "head_seconds", HANG)
        monkeypatch.setattr(Guard, "body_seconds", 0.1)
        with _socket(server) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_is_cut_off(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its connection would stay open without a limit. A chunk is larger than the system's buffers."""
    from fewbit.serving import answers
    from fewbit.serving.connections import Connection

    monkeypatch.setattr(Connection, "read_seconds", 0.2)
    chunk = answers.Form._chunk
    monkeypatch.setattr(
        answers.Form, "_chunk", lambda self, choices: chunk(self, choices) | {"padding": "x" * 3 * 10**7}
    )
    with served(quantized) as server:
        body = json.dumps({"messages": HELLO, "max_tokens": 400, "stream": True}).encode()
        with _socket(server) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: server.service.metrics.cancelled == 1)
            assert server.service.engine.unfinished == 0


def test_the_server_ends_although_a_client_does_not_read(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is whole, and waits in a buffer that is not full, so nothing else ends the connection."""
    from fewbit.serving import answers
    from fewbit.serving.connections import Connection

    monkeypatch.setattr(Connection, "read_seconds", 0.5)
    chunk, made = answers.Form._chunk, Connection.connection_made

    def roomy(self: Any, transport: Any) -> None:
        made(self, transport)
        transport.set_write_buffer_limits(high=2**30)

    monkeypatch.setattr(answers.Form, "_chunk", lambda self, choices: chunk(self, choices) | {"padding": "x" * 10**6})
    monkeypatch.setattr(Connection, "connection_made", roomy)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(quantized))
        client = stack.enter_context(_socket(server))
        body = json.dumps({"messages": HELLO, "max_tokens": 40, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        until(lambda: server.service.metrics.generated_tokens == 40)
        server.stop()  # asserts that it ends, while the client is there


def test_many_idle_connections_keep_nobody_out(quantized: Path) -> None:
    """Those without a request for longest make room."""
    with served(quantized, max_num_seqs=2, max_queue=2) as server, contextlib.ExitStack() as stack:
        busy = stack.enter_context(_socket(server))
        with server.held():
            body = json.dumps({"messages": HELLO, "max_tokens": 5}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            busy.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: server.service.engine.unfinished == 1)
            idle = [stack.enter_context(_socket(server)) for _ in range(300)]
            assert raw(server, "/health") == (200, {"status": "ok"})
            assert idle[0].recv(1) == b""  # it made room
            assert len(server.connections) <= 2 + 2 + 64
        assert busy.recv(12) == b"HTTP/1.1 200"


def test_a_connection_too_many_is_told(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.serving import run

    monkeypatch.setattr(run, "_BESIDE", -3)  # one connection is all
    with served(quantized, max_num_seqs=2, max_queue=2) as server:
        with server.held(), _socket(server) as busy:
            body = json.dumps({"messages": HELLO, "max_tokens": 5}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            busy.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: server.service.engine.unfinished == 1)
            status, answer = raw(server, "/v1/models")
        assert (status, answer["error"]["code"]) == (503, "too_many_connections")
        until(lambda: not server.connections)
        assert raw(server, "/v1/models")[0] == 200


def test_logits_that_are_no_numbers_end_their_request(server: Served, client: Any) -> None:
    import torch

    wanted, model = said(ask(client)), server.service.engine._manager.model
    computed = model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        made = computed(*args, **kwargs)
        made.logits[..., 5] = value
        return made

    try:
        model.forward = broken
        for value in (torch.nan, torch.inf):  # noqa: B007
            for more in ({}, {"temperature": 1.0, "logprobs": True}, {"stream": True}):
                with pytest.raises(openai.APIError, match="not a number"):
                    list(ask(client, **more))
        value = -torch.inf
        answer = ask(client, logprobs=True, top_logprobs=20, logit_bias={"5": 100})
        assert answer.choices[0].logprobs.content[0].logprob > -100
    finally:
        model.forward = computed
    assert said(ask(client)) == wanted
    assert (server.service.engine.unfinished, server.service.engine.failed) == (0, None)


def test_impossible_tokens_have_a_logprob_that_json_has() -> None:
    import torch

    from fewbit.models.decoding.choosing import likely

    (found,) = likely(torch.tensor([[0.0, -torch.inf]], dtype=torch.float32, device="cpu"), [1], 2)
    assert (found.logprob, found.top) == (-9999.0, ((0, 0.0), (1, -9999.0)))
