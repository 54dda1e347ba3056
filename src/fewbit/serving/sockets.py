"""The socket of the server. It is tried before anything heavy is imported."""

from __future__ import annotations

import socket

from fewbit.errors import PlanError


def bound(host: str, port: int) -> socket.socket:
    """A socket of that address, which does not listen yet. PlanError if it is taken or there is no such address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Of sockets without a protocol, asyncio does not know that they are TCP, and leaves Nagle's algorithm on: then
        # the second part of an answer waits 40 ms for the client's acknowledgement of the first.
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        raise PlanError(f"`host={host}`, `port={port}`: {error.strerror or error}", "Use another `port`.") from error
    return made
