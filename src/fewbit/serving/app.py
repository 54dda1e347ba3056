"""The application: its endpoints, and what becomes of errors.

No endpoint stops the server, and none reads a path that a client names.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fewbit.serving import answers, page
from fewbit.serving.asked import Chat, Completion
from fewbit.serving.failures import Failure
from fewbit.serving.guard import Guard
from fewbit.serving.replies import failed, reply, written
from fewbit.serving.service import Answers, Piece, Service
from fewbit.serving.settings import Serving

_GONE = 499  # nginx's status for a client that went away; nobody reads it


def application(service: Service, settings: Serving) -> FastAPI:
    """The application. settings: its key, address and limits."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.stop)  # uvicorn has waited for the connections

    # FastAPI's own pages load scripts from elsewhere.
    app = FastAPI(title="fewbit", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    app.add_exception_handler(Failure, _refused)
    app.add_exception_handler(HTTPException, _by_http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unexpected)

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        return await _answered(service, asked, request)

    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        return await _answered(service, asked, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return reply({"object": "list", "data": [answers.model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check(name)
        return reply(answers.model(service))

    @app.get("/health")
    async def health() -> Response:
        status = "failed" if service.engine.failed else "ok" if service.engine.ready else "unavailable"
        return reply({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def index() -> Response:
        return page.response()

    return app


async def _answered(service: Service, asked: Chat | Completion, request: Request) -> Response:
    service.check(asked.model)
    prompts = await service.prompts(asked)
    answer = service.begin(prompts, asked, await service.grammar(asked))
    form = answers.Form(service, asked, prompts)
    if asked.stream:
        return _Events(form, answer, service)
    try:
        work = asyncio.ensure_future(_all(answer))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return reply(form.whole(work.result(), answer))
            service.metrics.cancelled += 1
            return Response(status_code=_GONE)
        finally:
            work.cancel()
            gone.cancel()
    finally:
        answer.close()


async def _all(answer: Answers) -> list[tuple[int, Piece]]:
    return [piece async for piece in answer.pieces()]


async def _gone(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Events(StreamingResponse):
    """A stream of server-sent events. If the client goes away, its request ends."""

    def __init__(self, form: answers.Form, answer: Answers, service: Service) -> None:
        self._form, self._answer, self._service, self._whole = form, answer, service, False
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: nginx passes pieces on at once
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()
            self._service.metrics.cancelled += not self._whole

    async def _events(self) -> AsyncIterator[str]:
        for chunk in self._form.begin():
            yield _event(chunk)
        try:
            async for choice, piece in self._answer.pieces():
                for chunk in self._form.piece(choice, piece):
                    yield _event(chunk)
        except Failure as failure:  # the status has been sent
            yield _event(failure.body)
        else:
            for chunk in self._form.end(self._answer):
                yield _event(chunk)
        self._whole = True
        yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {written(chunk)}\n\n"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Failure)
    return failed(error)


async def _by_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = "/v1/chat/completions, /v1/completions, /v1/models, /health, /metrics and the page /"
    said = {
        404: f"There is no {request.url.path} here. There are {known}.",
        405: f"{request.url.path} has no method {request.method}.",
    }
    if error.status_code == 400:  # too deep, too large a number, or not UTF-8
        return failed(Failure(400, "The body cannot be read as JSON.", "invalid_json"))
    message = said.get(error.status_code, str(error.detail))
    return failed(Failure(error.status_code, message, headers=error.headers))


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or in which something has the wrong type or size."""
    assert isinstance(error, RequestValidationError)
    found = [(_place(each, error.body), each) for each in error.errors()]
    place, first = found[0]
    if first["type"] == "json_invalid":
        return failed(Failure(400, "The body is not valid JSON.", "invalid_json"))
    # A value of several types has an error for each. The one that goes deepest is for the type that is meant.
    place, first = max((each for each in found if each[0][:1] == place[:1]), key=lambda each: len(each[0]))
    if not place:
        # FastAPI reads no other type as JSON. A page of another site may send those without asking first.
        kind = request.headers.get("content-type", "")
        has = "" if "json" in kind else f" This one has {f'the type {kind}' if kind else 'no Content-Type'}."
        said = f"The body must be a JSON object, with the header Content-Type: application/json.{has}"
        return failed(Failure(400, said, "invalid_json"))
    return failed(Failure(400, f"{'.'.join(place)}: {first['msg']}", "invalid_value", place[0]))


def _place(error: Mapping[str, Any], body: Any) -> list[str]:
    """The keys and indices that lead to the error. pydantic puts names of types between them."""
    place, value = list[str](), body
    for part in error["loc"][1:]:
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
        if inside or (error["type"] == "missing" and part == error["loc"][-1]):
            place.append(str(part))
    return place


async def _unexpected(request: Request, error: Exception) -> Response:
    return failed(Failure(500, "The server failed; see its log.", "internal_error"))
