"""A server for one model, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fewbit.models.decoding.generate import continue_text, in_template, prompt_ids
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from tests.limits import HANG
from tests.served import HELLO, PROMPTS, Served, ask, raw, said, served, until, with_ends

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

EXACT = True


@pytest.fixture(scope="module")
def alone(quantized: Path) -> Any:
    """`alone(prompt, n)` is the greedy answer of `fewbit generate` with n tokens; without chat, the continuation."""
    source = locate(quantized)
    model, tokenizer = load_model(source, Loading("cpu", "float32")), load_tokenizer(source)

    def answer(prompt: str, new: int, chat: bool = True) -> str:
        return continue_text(model, tokenizer, prompt_ids(tokenizer, prompt, chat=chat), max_new_tokens=new).text

    return answer


def test_a_chat_answers_as_generate(client: Any, alone: Any) -> None:
    answer = ask(client, new=12)
    assert said(answer) == alone("Hello there", 12)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.model, answer.object) == ("tiny-4bit", "chat.completion")
    usage = answer.usage
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    again = client.chat.completions.create(
        model="tiny-4bit",
        messages=[{"role": "user", "content": parts}],
        max_completion_tokens=12,
        temperature=0,
        user="me",
        n=1,
        presence_penalty=0,
    )
    assert said(again) == said(answer)


def test_an_answer_may_be_sent_back(client: Any) -> None:
    first = ask(client)
    turns: list[Any] = [{"role": "system", "content": "Be brief."}, *HELLO]
    turns += [first.choices[0].message, {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model="tiny-4bit", messages=turns, max_tokens=4, temperature=0)
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_a_stream_has_the_same_text_and_the_usage(server: Served, client: Any) -> None:
    whole = ask(client, new=20)
    with server.held(after=3):
        stream = ask(client, new=20, stream=True, stream_options={"include_usage": True})
        chunks = [next(stream)]
        while not texts(chunks):  # the text begins to come while most of it is not computed
            chunks.append(next(stream))
        until(lambda: len(server.steps) == server.last)
    with stream:
        chunks += stream
    assert "".join(texts(chunks)) == said(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def texts(chunks: list[Any], index: int = 0) -> list[str]:
    """The pieces of text of an answer."""
    return [c.delta.content for chunk in chunks for c in chunk.choices if c.index == index and c.delta.content]


def test_completions(client: Any, alone: Any, quantized: Path) -> None:
    given: dict[str, Any] = {"model": "tiny-4bit", "temperature": 0}
    answer = client.completions.create(prompt="The garden", **given)
    assert answer.choices[0].text == alone("The garden", 16, chat=False)
    ids = load_tokenizer(locate(quantized))("The garden")["input_ids"]
    for prompt in (ids, [ids], ["The garden"]):
        assert client.completions.create(prompt=prompt, **given).choices[0].text == answer.choices[0].text
    with client.completions.create(prompt="The garden", stream=True, **given) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_32_at_once_answer_as_alone(server: Served, client: Any, alone: Any) -> None:
    """With activations that are not rounded (tests/conftest.py), and in float32."""
    asked = [(PROMPTS[i % 5] + " Yes." * (i // 5), 4 + i % 7) for i in range(32)]
    wanted = [alone(*each) for each in asked]
    server.steps.clear()
    with ThreadPoolExecutor(32) as pool:
        with server.held():
            answers = [pool.submit(ask, client, *each) for each in asked]
            until(lambda: server.service.engine.unfinished == 32)
        assert [said(answer.result()) for answer in answers] == wanted
    assert len(server.steps) < sum(new for _, new in asked) / 4  # they were computed together


def test_a_long_prompt_is_read_in_pieces(server: Served, client: Any, alone: Any) -> None:
    prompt = " ".join(PROMPTS * 9)
    server.steps.clear()
    wanted = alone(prompt, 5)
    assert said(ask(client, prompt, 5)) == wanted
    first = sum(server.steps)
    server.steps.clear()
    assert said(ask(client, prompt, 5)) == wanted
    assert sum(server.steps) < first / 4  # the keys and values of the same beginning were kept


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_across_tokens(stream: bool, client: Any) -> None:
    whole = said(ask(client, new=40))
    stop = whole[20:29]  # begins and ends inside words
    answer = ask(client, new=40, stop=["never there", stop], stream=stream)
    if stream:
        with answer:
            chunks = [chunk.choices[0] for chunk in answer]
        text, finish = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        text, finish = said(answer), answer.choices[0].finish_reason
        assert answer.usage.completion_tokens < 40
    assert (text, finish) == (whole[: whole.index(stop)], "stop")


def test_the_end_of_an_answer(tmp_path: Path, quantized: Path, client: Any) -> None:
    ids = load_tokenizer(locate(quantized))
    tokens = client.completions.create(model="tiny-4bit", prompt="A", temperature=0, logprobs=0).choices[0]
    end = ids.convert_tokens_to_ids(ids.tokenize(tokens.logprobs.tokens[5]))[0]
    with (
        served(with_ends(quantized, tmp_path / "ending", end), served_model_name="other") as server,
        server.client() as other,
    ):
        answer = other.completions.create(model="other", prompt="A", temperature=0)
        assert answer.choices[0].finish_reason == "stop"
        assert tokens.text.startswith(answer.choices[0].text)
        assert answer.usage.completion_tokens <= 6
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            other.completions.create(model="tiny-4bit", prompt="A")


def test_a_seed_repeats_whatever_else_runs(client: Any) -> None:
    def sampled(seed: int | None, **more: Any) -> str:
        return said(ask(client, new=16, temperature=1.0, seed=seed, **more))

    first = sampled(7)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(sampled, [7, 8, 7, 9, 7, None, 7, None]))
    assert [texts[i] == first for i in range(8)] == [True, False, True, False, True, False, True, False]
    assert sampled(1, top_p=1e-9) == sampled(2, top_p=1e-9) == said(ask(client, new=16))
    assert sampled(1, extra_body={"top_k": 1}) == said(ask(client, new=16))


def test_logprobs_are_those_of_the_model(client: Any, quantized: Path) -> None:
    import torch

    answer = ask(client, new=6, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(each.token for each in content) == said(answer)
    source = locate(quantized)
    model, tokenizer = load_model(source, Loading("cpu", "float32")), load_tokenizer(source)
    prompt = tokenizer(in_template(tokenizer, HELLO), add_special_tokens=False)["input_ids"]
    tokens = tokenizer(said(answer), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    values, ids = logits.log_softmax(-1).topk(3)
    for place, each in enumerate(content):
        assert each.logprob == pytest.approx(values[place, 0].item(), abs=1e-4)
        assert [top.token for top in each.top_logprobs] == [tokenizer.decode([i]) for i in ids[place].tolist()]
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(values[place].tolist(), abs=1e-4)
    with ask(client, new=6, logprobs=True, stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    streamed = [each.token for c in choices if c.logprobs for each in c.logprobs.content]
    assert streamed == [each.token for each in content]


def test_penalties_and_bias_of_each_request(client: Any, quantized: Path) -> None:
    """Against a loop over the model's logits, and beside a request that has none."""
    import torch

    source = locate(quantized)
    model, tokenizer = load_model(source, Loading("cpu", "float32")), load_tokenizer(source)
    prompt = tokenizer(in_template(tokenizer, HELLO), add_special_tokens=False)["input_ids"]
    first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())

    settings: list[tuple[float, float, dict[int, float]]] = [
        (0, 0, {}),
        (2, 0, {}),
        (0, 1.0, {}),
        (-2, -2, {}),
        (0, 0, {first: -100}),
        (0, 0, {5: 100}),
    ]
    answered: list[list[int]] = [[] for _ in settings]
    for _ in range(48):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens for tokens in answered])).logits[:, -1].float()
        for row, tokens, (presence, frequency, bias) in zip(logits, answered, settings, strict=True):
            for token in {*tokens, *bias}:
                count = tokens.count(token)
                row[token] += bias.get(token, 0) - count * frequency - (presence if count else 0)
            tokens.append(int(row.argmax()))
    with ThreadPoolExecutor(len(settings)) as pool:

        def answer(given: tuple[float, float, dict[int, float]]) -> str:
            bias = {str(token): value for token, value in given[2].items()}
            return said(ask(client, new=48, presence_penalty=given[0], frequency_penalty=given[1], logit_bias=bias))

        answers = list(pool.map(answer, settings))
    assert answers == [tokenizer.decode(tokens) for tokens in answered]
    assert len(set(answers)) >= 4
    assert answers[0] not in (*answers[1:3], *answers[4:])


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"best_of": 2}, "best_of", "does not support"),
        ({"echo": True}, "echo", "only in /v1/completions"),
        ({"prompt": "x"}, "prompt", "only in /v1/completions"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "ends before"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": "much"}, "presence_penalty", "valid number"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"word": 1}}, "logit_bias", "match pattern"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "token ids go from 0"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "does not pad"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "unknown parameter"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": " \ud800"}]}, "messages", "half a character"),
        ({"messages": [{"role": "user"}]}, "messages", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], param: str, words: str, server: Served) -> None:
    change = change.pop("extra_body", {}) | change
    body = {"model": "tiny-4bit", "messages": HELLO, "max_tokens": 4} | change
    status, answer = raw(server, "/v1/chat/completions", json.dumps(body).encode())
    assert status == 400
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", param)
    assert words in answer["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([-1], "token ids"),
        ([10**6], "token ids"),
        ([[]], "empty"),
        (["a", ""], "empty"),
        (["a", [1], None], "a list of token ids"),
        ([[1], [1.5]], "a list of token ids"),
        (["a"] * 321, "up to 320 answers"),
    ],
)
def test_bad_prompts_are_named(prompt: Any, words: str, server: Served) -> None:
    status, answer = raw(server, "/v1/completions", json.dumps({"prompt": prompt}).encode())
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert words in answer["error"]["message"]


def test_beyond_the_context(client: Any, server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "word " * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="512"):
        ask(client, new=505)
    prompt = " ".join(PROMPTS * 18)
    answer = ask(client, prompt, new=None)
    assert 450 < answer.usage.prompt_tokens < answer.usage.total_tokens == server.service.engine.context == 512


def test_what_is_no_request(server: Served, client: Any) -> None:
    for body in (b"{", b"[]", b"1", b"\xff"):
        status, answer = raw(server, "/v1/chat/completions", body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    for kind, words in (("text/plain", "has the type text/plain"), ("", "has no Content-Type")):
        status, answer = raw(server, "/v1/completions", b'{"prompt": "x"}', Content_Type=kind)
        assert (status, words in answer["error"]["message"]) == (400, True)
    status, answer = raw(server, "/v1/completions", json.dumps({"messages": HELLO}).encode())
    assert (status, answer["error"]["message"]) == (400, "messages: only in /v1/chat/completions")
    status, answer = raw(server, "/chat/completions", b"{}")
    assert (status, "/v1/chat/completions" in answer["error"]["message"]) == (404, True)
    assert raw(server, "/v1/nothing")[0] == 404
    assert raw(server, "/v1/chat/completions")[0] == 405
    for path in ("/docs", "/openapi.json", "/shutdown", "/v1/models/../../etc/passwd"):
        assert raw(server, path)[0] == 404
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(client, model="/etc/passwd")
    assert [each.id for each in client.models.list()] == ["tiny-4bit"]
    assert client.models.retrieve("tiny-4bit").max_model_len == 512


def test_clients_close_idle_connections_first() -> None:
    """If both sides close at the same moment, the client's next request fails with "Connection reset by peer"."""
    from fastapi import FastAPI

    from fewbit.serving import run
    from fewbit.serving.settings import Serving

    server, nginx, aws = run.configuration(FastAPI(), Serving()).timeout_keep_alive, 60, 60
    with openai.OpenAI(api_key="none") as client:
        pool = client._client._transport._pool
        assert server > max(pool._keepalive_expiry, nginx, aws)


def test_nothing_is_held_back_for_an_acknowledgement(server: Served, client: Any) -> None:
    ask(client, new=1)
    sockets = [each.transport.get_extra_info("socket") for each in server.connections]
    assert sockets
    assert all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)


def test_answers_wake_the_event_loop_rarely(server: Served, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, wake = server.service.begin, asyncio.Event.set
    begun, woken = list[Any](), [0]

    def noted(*given: Any) -> Any:
        begun.append(begin(*given))
        return begun[-1]

    def counted(event: asyncio.Event) -> None:
        woken[0] += any(event is answer._came for answer in begun)
        wake(event)

    monkeypatch.setattr(server.service, "begin", noted)
    monkeypatch.setattr(asyncio.Event, "set", counted)
    whole = said(ask(client, new=40))
    assert 1 <= woken[0] <= 3
    woken[0] = 0
    monkeypatch.setattr("fewbit.serving.service._PAUSE", 0.5)
    with ask(client, new=40, stream=True) as stream:
        pieces = texts(list(stream))
    assert "".join(pieces) == whole
    # For each piece, and once more for what comes before the piece is made.
    assert 1 <= woken[0] <= 2 * len(pieces) + 1 < 30


def test_pieces_of_a_stream_come_after_a_pause(server: Served, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came meanwhile is one piece. The first token comes at once."""
    whole = said(ask(client, new=40))
    monkeypatch.setattr("fewbit.serving.service._PAUSE", HANG)
    for n in (1, 2):
        first = said(ask(client, new=1))  # after it, no step of an earlier request is left
        # If the first token waited for the pause, it would not come within a minute.
        with server.held(after=1), ask(client.with_options(timeout=60), new=40, stream=True, n=n) as stream:
            assert next(c.delta.content for chunk in stream for c in chunk.choices if c.delta.content) == first
    monkeypatch.setattr("fewbit.serving.service._PAUSE", 0.5)
    for n in (1, 2):
        with ask(client, new=40, stream=True, n=n) as stream:
            pieces = texts(list(stream))
        assert pieces[0].startswith(first)
        assert len(pieces) < 20
        assert "".join(pieces) == whole


def test_a_full_queue_and_one_that_empties(quantized: Path) -> None:
    with served(quantized, max_num_seqs=1, max_queue=1) as server, server.client() as client:
        wanted = said(ask(client))
        with ThreadPoolExecutor(2) as pool:
            with server.held():
                answers = [pool.submit(ask, client) for _ in range(2)]
                until(lambda: server.service.engine.unfinished == 2)
                with pytest.raises(openai.RateLimitError) as caught:
                    ask(client)
                assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "1")
            assert [said(answer.result()) for answer in answers] == [wanted] * 2
        assert said(ask(client)) == wanted
        assert [choice.message.content for choice in ask(client, n=2).choices] == [wanted] * 2
        with pytest.raises(openai.BadRequestError, match="up to 2 answers"):
            ask(client, n=3)
        with server.held(), ask(client, stream=True), pytest.raises(openai.RateLimitError):
            ask(client, n=2)
        until(lambda: server.service.engine.unfinished == 0)


def test_a_client_that_goes_away_ends_its_request(server: Served, client: Any) -> None:
    engine = server.service.engine
    cancelled = server.service.metrics.cancelled
    stream = ask(client, new=400, stream=True)
    next(iter(stream))
    with server.held():
        stream.close()
        until(lambda: engine.unfinished == 0)
        body = json.dumps({"messages": HELLO, "max_tokens": 400}).encode()
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as raw_client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            raw_client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: engine.unfinished == 1)
        until(lambda: engine.unfinished == 0)
        stream = ask(client, new=400, stream=True, n=3)
        until(lambda: engine.unfinished == 3)
        stream.close()
        until(lambda: engine.unfinished == 0)
    until(lambda: server.service.metrics.cancelled == cancelled + 3)
    ask(client, new=3)
    server.steps.clear()
    ask(client, new=5)
    assert server.steps[1:] == [1] * 4  # a step has no tokens of other requests


def test_the_key_and_the_limit_of_a_body(quantized: Path) -> None:
    with served(quantized, api_key="se cret", max_body="2kB") as server:
        for key in ("se cre", "se crett", "Se cret", "\xe9"):
            status, answer = raw(server, "/v1/models", Authorization=f"Bearer {key}")
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert raw(server, "/v1/chat/completions", b"{}")[0] == 401
        assert raw(server, "/health") == (200, {"status": "ok"})
        with server.client(api_key="se cret") as client:
            assert said(ask(client))
            with pytest.raises(openai.APIStatusError) as caught:
                ask(client, "word " * 400)
            assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
            assert said(ask(client))
        port = int(server.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw_client:  # without saying how much comes
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer se cret\r\n"
            raw_client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n800\r\n".encode() + b" " * 2048 + b"\r\n")
            assert raw_client.recv(100).startswith(b"HTTP/1.1 413")


def test_metrics_count(client: Any, server: Served) -> None:
    def number(name: str) -> float:
        with urllib.request.urlopen(server.address + "/metrics") as answer:
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            lines = answer.read().decode().splitlines()
        return float(next((line.split()[-1] for line in lines if line.startswith(name)), 0))  # none came yet

    names = [f"fewbit_{name}" for name in ("generated_tokens_total", "request_seconds_count", "prompt_tokens_total")]
    names.append('fewbit_requests_total{endpoint="/v1/chat/completions",status="200"}')
    before = [number(name) for name in names]
    prompt = ask(client, new=5).usage.prompt_tokens
    after = [number(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 1, prompt, 1]
