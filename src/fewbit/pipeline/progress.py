"""Progress of a quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """`done` of `total` blocks are finished. `error`: mean error of the last one; None if nothing is quantized.

    `resumed`: it came from the cache. `what`: what is counted: "block", then in GGUF files "embeddings and head".
    `gain`: the share by which tuning lowered the error of its output; None if it was not to be tuned.
    """

    done: int
    total: int
    error: float | None
    resumed: bool
    gain: float | None = None
    what: str = "block"


Progress = Callable[[Step], None]
