"""Runs the application until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fewbit.serving.connections import Connection
from fewbit.serving.settings import Serving

# Seconds after which an idle connection is closed. A client must close it first: if both do so at the same moment, the
# client's next request meets a closed connection and fails. Clients keep idle connections for 5 s (openai in Python,
# Node.js), nginx and the load balancers of AWS for 60 s.
_IDLE = 75


# Connections besides those whose requests run or wait: idle ones of clients, and of what reads /health.
_BESIDE = 64


def configuration(app: FastAPI, settings: Serving) -> uvicorn.Config:
    """How uvicorn serves the application."""
    most = settings.max_num_seqs + settings.max_queue + _BESIDE
    with suppress(ImportError, OSError):  # the system's limit of open files, which the model's files need too
        import resource

        most = min(most, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1))
    return uvicorn.Config(
        app,
        http=type("LimitedConnection", (Connection,), {"most": most}),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_IDLE,
        server_header=False,
    )


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], None],
        failed: Callable[[], bool],
        ending: Callable[[int], None],
    ) -> None:
        super().__init__(config)
        self._ready, self._failed, self._ending = ready, failed, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:  # ten times a second
        return await super().on_tick(counter) or self._failed()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending(sum(isinstance(each, Connection) and each.answers for each in self.server_state.connections))
        cutting = asyncio.create_task(self._cut())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def _cut(self) -> None:
        """Cut all connections off after a second SIGINT: from Python 3.12 on, uvicorn waits for them to close."""
        while True:
            if self.force_exit:
                for connection in list(self.server_state.connections):
                    if connection.transport is not None:
                        connection.transport.abort()
            await asyncio.sleep(0.1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:  # what runs is cancelled, and uvicorn would log a traceback for each request
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def run(
    app: FastAPI,
    at: socket.socket,
    settings: Serving,
    ready: Callable[[], None],
    failed: Callable[[], bool],
    ending: Callable[[int], None],
) -> None:
    """Serve until SIGTERM or SIGINT. What runs is finished before; nothing new is accepted meanwhile.

    After a second SIGINT, what runs is cancelled. ready: called when requests are accepted. failed: whether to end, as
    after a signal. ending: called when nothing new is accepted, with the number of requests that are not answered.
    """
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again when all is done, and the process would seem to have been killed.
        signal.signal(signal.SIGTERM, lambda *_: None)
    _Server(configuration(app, settings), ready, failed, ending).run(sockets=[at])
