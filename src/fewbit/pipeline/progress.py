"""Progress of a quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` blocks, the last with this mean error; `resumed` if its result was found."""

    done: int
    total: int
    error: float
    resumed: bool


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Progress that nobody wants to see."""
