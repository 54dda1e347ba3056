"""Limits of connections: their number, and how long a client may send no request or not read its answer."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fewbit.serving.failures import Failure
from fewbit.serving.replies import failed


class Connection(H11Protocol):
    """A connection of uvicorn with limits of number and time.

    uvicorn takes connections until the process has no file descriptors left. Here, a connection beyond the limit takes
    the place of the one that has been without a request for longest. If all have requests, it gets the status 503.

    uvicorn closes a connection that is idle after an answer. It waits without a limit for the first request, for the
    rest of a head, and for a client that does not read, also when the server is to end.
    """

    most = 1000  # connections at once
    head_seconds = 60.0  # for the head of a request, from its first byte or the begin of the connection
    read_seconds = 60.0  # in which a client must read something of what waits for it

    _head: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _ending = False  # whether the server ends
    _since = 0.0  # when the last request came, or the connection began

    def connection_made(self, transport: Any) -> None:
        self._since = self.loop.time()
        if len(self.connections) >= self.most:
            idle = [each for each in self.connections if isinstance(each, Connection) and each._is_idle]
            if idle:
                min(idle, key=lambda each: each._since).transport.abort()
            else:
                self.app = _full
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_seconds, transport.close)

    @property
    def answers(self) -> bool:
        """Whether a request has come whose answer is not complete."""
        cycle: Any = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    @property
    def _is_idle(self) -> bool:
        return not self.answers and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        self._since = self.loop.time()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            _cancel(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        _cancel(self._reading)
        super().resume_writing()
        if self._ending:
            self._watch(0)

    def shutdown(self) -> None:
        super().shutdown()
        # An answer that fits the buffer pauses nothing, and its connection would stay until the client reads it.
        self._ending = True
        self._watch(self.transport.get_write_buffer_size())

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head)
        _cancel(self._reading)
        super().connection_lost(exc)

    def _watch(self, waiting: int) -> None:
        _cancel(self._reading)
        self._reading = self.loop.call_later(self.read_seconds, self._check, waiting)

    def _check(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if 0 < before <= waiting:
            self.transport.abort()
        else:
            self._watch(waiting)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    said = "The server has no place for another connection. Try again later."
    await failed(Failure(503, said, "too_many_connections", headers={"Connection": "close", "Retry-After": "1"}))(
        scope, receive, send
    )
