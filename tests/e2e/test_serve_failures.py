"""Errors of the engine: they end the requests that run, and the server goes on if it can compute."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.limits import HANG
from tests.served import PROMPTS, ask, raw, said, served, until

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")


def test_an_error_of_a_step_ends_its_requests_only(quantized: Path) -> None:
    """As if a step of more than 50 tokens did not fit into the memory."""
    with served(quantized) as server, server.client() as client:
        model, wanted = server.service.engine._manager.model, said(ask(client))
        computed = model.forward

        def small(*args: Any, **kwargs: Any) -> Any:
            server.gate.wait(HANG)
            if len(kwargs["input_ids"][0]) > 50:
                raise RuntimeError("out of something")
            return computed(*args, **kwargs)

        model.forward = small
        with ThreadPoolExecutor(3) as pool:
            with server.held():
                failing = [pool.submit(ask, client, PROMPTS[i] + " word" * 60) for i in range(2)]
                until(lambda: server.service.engine.unfinished == 2)
                streamed = ask(client, new=8, stream=True)
                until(lambda: server.service.engine.unfinished == 3)
            for each in failing:
                with pytest.raises(openai.InternalServerError, match="out of something") as caught:
                    each.result()
                assert (caught.value.status_code, caught.value.code) == (500, "engine_failed")
            with streamed, pytest.raises(openai.APIError, match="out of something"):
                list(streamed)
        until(lambda: server.service.engine.ready)
        assert raw(server, "/health") == (200, {"status": "ok"})
        assert said(ask(client)) == wanted
        assert (server.service.engine.unfinished, server.service.engine.failed) == (0, None)


def test_an_engine_that_cannot_compute_has_failed(quantized: Path) -> None:
    with served(quantized) as server, server.client() as client:
        engine = server.service.engine

        def broken(*args: Any, **kwargs: Any) -> Any:
            server.gate.wait(HANG)
            raise RuntimeError("the device is gone")

        engine._manager.model.forward = broken
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, client)
            with pytest.raises(openai.InternalServerError, match="device is gone"):
                answer.result()
        until(lambda: engine.failed is not None)
        assert raw(server, "/health") == (503, {"status": "failed"})
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")


def test_nothing_is_accepted_while_the_engine_starts_again(quantized: Path) -> None:
    with served(quantized) as server, server.client() as client:
        engine, wanted = server.service.engine, said(ask(client))
        model, failing = engine._manager.model, [True]
        computed = model.forward

        def once(*args: Any, **kwargs: Any) -> Any:
            if failing:
                failing.clear()
                server.gate.clear()  # holds up the token that the engine computes by itself
                raise RuntimeError("once")
            return computed(*args, **kwargs)

        model.forward = once
        with pytest.raises(openai.InternalServerError, match="once"):
            ask(client)
        until(lambda: not engine._accepting)
        assert raw(server, "/health") == (503, {"status": "unavailable"})
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
        assert caught.value.response.headers["retry-after"] == "1"
        server.gate.set()
        until(lambda: engine.ready)
        assert said(ask(client)) == wanted
