"""The settings of an optimizer, with their checks. Importing them is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbit.checks import flag, integer, invalid, number
from fewbit.settings import Settings, setting

_WARM_UP = 0.1  # share of the steps
_MEASUREMENTS = 20  # of the held-out loss, in all steps


def _rate(name: str, value: object) -> float:
    found: float = number(name, value)
    if not found > 0:
        raise invalid(name, value, "a number above 0")
    return found


@dataclass(frozen=True)
class Optimization(Settings):
    """Settings of an optimizer. ArgumentError for a value out of range."""

    steps: int = setting(200, integer(1), "Optimizer steps.")
    learning_rate: float = setting(
        2e-3, _rate, "Peak learning rate (linear warm-up over 10 % of the steps, then cosine decay to 0)."
    )
    batch: int = setting(1024, integer(1), "Tokens in an optimizer step, rounded up to whole windows.")
    codes: bool = setting(False, flag, "Train the codes of linears too. It takes 24 bytes of memory for each weight.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    @property
    def every(self) -> int:
        """The number of steps between two measurements."""
        return max(1, self.steps // _MEASUREMENTS)
