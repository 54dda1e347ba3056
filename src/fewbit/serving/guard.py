"""What comes before every request is read: the API key, and the limit of its size."""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewbit import units
from fewbit.serving.failures import Failure
from fewbit.serving.metrics import Metrics
from fewbit.serving.replies import failed

_COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/models")  # other paths come from clients: not in a label


class Guard:
    """Refuses requests without the key or with too large a body, before the application sees them."""

    def __init__(self, app: ASGIApp, key: str | None, most: int, metrics: Metrics) -> None:
        """most: bytes of a body."""
        self._app, self._most, self._metrics = app, most, metrics
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] in _COUNTED:
                self._metrics.requests[scope["path"], message["status"]] += 1
            await send(message)

        try:
            self._check_key(scope)
            receive = await self._read(scope, receive)
        except Failure as failure:
            await failed(failure)(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)

    def _check_key(self, scope: Scope) -> None:
        """Failure without the right key. The page, /health and /metrics need none."""
        if self._key is None or not scope["path"].startswith("/v1/"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        # In constant time: the time must not tell how much of a wrong key is right.
        if not secrets.compare_digest(key.strip(), self._key) or kind.lower() != b"bearer":
            message = "The API key is wrong." if given else "No API key: send the header `Authorization: Bearer KEY`."
            raise Failure(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the whole body at once. Failure if the body is too large; it is then not read."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), scope["method"] not in ("GET", "HEAD")
        if not stated.isdigit() or int(stated) > self._most:
            raise self._too_large()
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                raise self._too_large()
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        return replayed

    def _too_large(self) -> Failure:
        message = f"The body is larger than {units.size(self._most)}."
        return Failure(413, message, "body_too_large", headers={"Connection": "close"})
