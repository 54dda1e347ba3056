"""The command that serves a model with an engine of others, or why this engine cannot serve it.

What an engine reads, on which cards, and its options are facts of rules.json (`targets`), as for `recommend`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbit.advise.rules import rules


def engines() -> tuple[str, ...]:
    """Names of the engines."""
    return tuple(name for name, target in rules()["targets"].items() if "serve" in target)


@dataclass(frozen=True)
class Started:
    """How an engine is started: `arguments`, the program first, and what its environment has more.

    The API key is in the environment, where other users do not see it in the list of processes.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """The command for a shell; a variable of the environment by its name only."""
        hidden = [f'{name}="${name}"' for name in self.environment]
        return " ".join([*hidden, shlex.join(self.arguments)])


def started(engine: str, model: str, options: Mapping[str, Any] | None = None) -> Started:
    """The command of `engine` for `model`, a folder or a GGUF file.

    options: host, port, api_key, name (of the model for clients), context (tokens of a request), requests (at once),
    remote_code (True: run the model's own code). What is missing or None is left to the engine.
    """
    serve, given = rules()["targets"][engine]["serve"], dict(options or {})
    key = given.pop("api_key", None)
    arguments = [part.format(model=model) for part in serve["command"]]
    if serve.get("shared_context"):  # the engine divides the context by the number of requests
        if given.get("context"):
            given["requests"] = given.get("requests") or 1
            given["context"] *= given["requests"]
        elif given.get("requests"):  # each may have all of it, as long as others leave room
            arguments.append(serve["shared_context"])
    for name, value in given.items():
        if value is True:
            arguments.append(serve["options"][name])
        elif value not in (None, False):
            arguments += [serve["options"][name], str(value)]
    return Started(tuple(arguments), {} if key is None else {serve["key"]: key})


def install(engine: str) -> str:
    """How the engine is installed."""
    return str(rules()["targets"][engine]["serve"]["install"])


def why_not(engine: str, format: str | None, capability: tuple[int, int] | None) -> str | None:
    """Why `engine` cannot serve a model of this format here; None if it can.

    format: a name of the registry, or None for weights that are not quantized. capability: compute capability of the
    NVIDIA GPU, such as (9, 0); None without one.
    """
    target = rules()["targets"][engine]
    reads = list(target["formats"])
    if format is None and not target["serve"]["unquantized"]:
        return f"{engine} reads {', '.join(reads)} files, and this model is not quantized"
    if format is not None and format not in reads:
        return f"{engine} reads {', '.join(reads)}, not {format}"
    if cards := target.get("cards"):
        least = min(tuple(card["from"]) for card in cards)
        if capability is None:
            return f"{engine} needs an NVIDIA GPU, and there is none"
        if capability < least:
            need, has = (f"{a}.{b}" for a, b in (least, capability))
            return f"{engine} needs a GPU of compute capability {need}, and this one has {has}"
    return None
