"""Progress of a quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """`done` of `total` blocks are finished. `error`: mean error of the last one. `resumed`: it came from the cache.

    `gain`: the share by which tuning lowered the error of its output; None if it was not to be tuned.
    """

    done: int
    total: int
    error: float
    resumed: bool
    gain: float | None = None


Progress = Callable[[Step], None]
