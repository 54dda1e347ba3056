"""Settings of the calibration data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fewbit import checks
from fewbit.checks import Texts


@dataclass(frozen=True)
class Calibration:
    """`samples` windows of `length` tokens (at most the model's context), drawn from a text with `seed`.

    text: a name, a file, or a list of texts. None: the text "tiny" for the embedded model, "pydoc" for all others.
    """

    text: Texts | None = None
    samples: int = 128
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if name != "text" or value is not None:
                object.__setattr__(self, name, check(name, value))


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "text": checks.texts,
    "samples": checks.integer(1),
    "length": checks.integer(1),
    "seed": checks.integer(0, checks.MAX_SEED),
}
