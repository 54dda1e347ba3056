"""The settings of the server, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewbit.checks import integer, invalid, size, text
from fewbit.settings import Settings, setting

ENGINES = ("fewbit", "vllm", "llama.cpp")


def _filled(name: str, value: Any) -> str:
    if not text(name, value).strip() or not value.isprintable():
        raise invalid(name, value, "a text that is not empty, without control characters")
    return str(value)


def _key(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value.strip():
        raise invalid(name, "...", "printable ASCII characters")  # a key does not belong in a message
    return value


def _engine(name: str, value: Any) -> str:
    if value not in ENGINES:
        raise invalid(name, value, " or ".join(ENGINES))
    return str(value)


@dataclass(frozen=True)
class Serving(Settings):
    """How a model is served. ArgumentError for an invalid value."""

    engine: str = setting("fewbit", _engine, "Program that serves: fewbit, vllm or llama.cpp, which must be installed.")
    host: str = setting("127.0.0.1", _filled, "Address to listen on. 0.0.0.0 is every interface of this machine.")
    port: int = setting(8000, integer(0, 65535), "Port to listen on. 0 takes a free one.")
    api_key: str | None = setting(
        None, _key, "Key that clients must send. Default: the environment's FEWBIT_API_KEY, or none."
    )
    served_model_name: str | None = setting(
        None, _filled, "Name of the model for clients. Default: the last part of MODEL."
    )
    max_model_len: int | None = setting(
        None, integer(2), "Maximum tokens of prompt and answer. Default: the model's context, which is also the limit."
    )
    max_num_seqs: int = setting(64, integer(1, 1024), "Maximum number of requests that are computed at once.")
    max_queue: int = setting(256, integer(0), "Maximum number of requests that wait. More get the status 429.")
    max_body: str = setting("4MB", size, "Maximum size of a request's body. A larger one gets the status 413.")
