"""Connections that do not go on: a client that sends no request, or does not read its answer, is cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """A connection of uvicorn with limits of time.

    uvicorn closes a connection that is idle after an answer. It waits without a limit for the first request, for the
    rest of a head, and for a client that does not read, also when the server is to end.
    """

    head_seconds = 60.0  # for the head of a request, from its first byte or the begin of the connection
    read_seconds = 60.0  # in which a client must read something of what waits for it

    _head: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
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

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head)
        _cancel(self._reading)
        super().connection_lost(exc)

    def _watch(self, waiting: int) -> None:
        self._reading = self.loop.call_later(self.read_seconds, self._check, waiting)

    def _check(self, before: int) -> None:
        if (waiting := self.transport.get_write_buffer_size()) < before:
            self._watch(waiting)
        else:
            self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
