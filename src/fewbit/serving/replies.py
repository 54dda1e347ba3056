"""Responses of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from fewbit.serving.failures import Failure


def written(body: Any) -> str:
    """JSON in ASCII: what a client sends may come back in a message, and not all of it can be encoded in UTF-8."""
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


def reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(written(body), status, dict(headers or {}), "application/json")


def failed(failure: Failure) -> Response:
    """The response to a request that is refused."""
    return reply(failure.body, failure.status, failure.headers)
