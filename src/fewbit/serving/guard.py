"""What comes before every request is read: the server's name, the API key, and the limits of a body."""

from __future__ import annotations

import asyncio
import secrets
from ipaddress import ip_address

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewbit import units
from fewbit.serving.failures import Failure
from fewbit.serving.metrics import Metrics
from fewbit.serving.replies import failed
from fewbit.serving.settings import Serving

_COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/models")  # other paths come from clients: not in a label


class Guard:
    """Refuses requests without the key or with too large a body, before the application sees them.

    A page of another site may let its name point to this machine ("DNS rebinding"); a browser then lets the page ask
    this server. A server without a key that listens only to this machine therefore answers only to its own names.
    """

    body_seconds = 120.0  # in which a body must come

    def __init__(self, app: ASGIApp, settings: Serving, metrics: Metrics) -> None:
        self._app, self._most, self._metrics = app, int(settings.max_body), metrics
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._name = settings.host.lower()
        self._only_own_names = self._key is None and _of_this_machine(self._name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] in _COUNTED:
                self._metrics.requests[scope["path"], message["status"]] += 1
            await send(message)

        try:
            self._check_name(scope)
            self._check_key(scope)
            receive = await self._read(scope, receive)
        except Failure as failure:
            await failed(failure)(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)

    def _check_name(self, scope: Scope) -> None:
        """Failure for another site's name."""
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self._only_own_names and name not in ("", self._name) and not _of_this_machine(name) and not _address(name):
            message = "Without an API key, this server answers only to names of this machine, such as localhost."
            raise Failure(403, message, "unknown_host")

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
        try:
            async with asyncio.timeout(self.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._most:
                        raise self._too_large()
        except TimeoutError as error:
            said = f"The body did not come within {self.body_seconds:.0f} seconds."
            raise Failure(408, said, "request_timeout", headers={"Connection": "close"}) from error
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        return replayed

    def _too_large(self) -> Failure:
        message = f"The body is larger than {units.size(self._most)}."
        return Failure(413, message, "body_too_large", headers={"Connection": "close"})


def _of_this_machine(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _address(name) and ip_address(name).is_loopback


def _address(name: str) -> bool:
    """Whether `name` is the number of an address, which no other site can have as its name."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
