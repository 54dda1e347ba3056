"""The settings of sampling, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewbit.checks import MAX_SEED, integer, invalid, number
from fewbit.settings import Settings, setting


@dataclass(frozen=True)
class Sampling(Settings):
    """How `generate` chooses each token. ArgumentError for an invalid value."""

    temperature: float = setting(
        0.0, number, "0: always take the most likely token. Above 0: sample; higher is more varied."
    )
    top_k: int | None = setting(
        None, integer(0), "Sample from the K most likely tokens; 0: all. Default: generation_config.json, or 50."
    )
    top_p: float | None = setting(
        None,
        number,
        "Sample from the most likely tokens whose probabilities sum to P; 1: all. "
        "Default: generation_config.json, or 1.",
    )
    seed: int = setting(0, integer(0, MAX_SEED), "Random seed.")

    def __post_init__(self) -> None:
        super().__post_init__()
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
