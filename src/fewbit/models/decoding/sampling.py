"""The settings of sampling, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewbit.checks import MAX_SEED, integer, invalid, number


@dataclass(frozen=True)
class Sampling:
    """How `generate` chooses each token: the most likely one at temperature 0, else a random one.

    top_k: choose among the k most likely tokens; 0 for all. top_p: choose among the most likely tokens whose
    probabilities add up to p; 1 for all. None takes the value in generation_config.json, else transformers' default (50
    and 1). seed: random seed. ArgumentError for an invalid value.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {"temperature": number, "top_k": integer(0), "top_p": number, "seed": integer(0, MAX_SEED)}
        for name, check in checks.items():
            if (value := getattr(self, name)) is not None or name in ("temperature", "seed"):
                object.__setattr__(self, name, check(name, value))
        if self.temperature < 0:
            raise invalid("temperature", self.temperature, "0 for the most likely token, about 0.7 for some variety")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise invalid("top_p", self.top_p, "a number above 0, up to 1")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise invalid(name, value, "a temperature above 0 with it: 0 always chooses the most likely token")

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        limits = {name: value for name in ("top_k", "top_p") if (value := getattr(self, name)) is not None}
        return {"do_sample": True, "temperature": self.temperature, **limits}
