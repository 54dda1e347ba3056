"""The settings of a LoRA training, with their checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from fewbit import checks as arguments
from fewbit.errors import PlanError


@dataclass(frozen=True)
class Tuning:
    """Settings of a LoRA training. PlanError for a value out of range.

    rank: LoRA rank. alpha: the LoRA update is scaled by alpha / rank; 2 · rank by default. dropout: LoRA dropout.
    targets: name endings of the linears that get a LoRA; all linears but the output head by default.
    learning_rate: peak learning rate (linear warm-up over 5 % of the steps, then linear decay to 0).
    epochs: passes over the training examples. steps: optimizer steps; replaces `epochs`.
    batch: examples per forward pass. accumulate: gradient accumulation steps; one optimizer step takes
    `batch` · `accumulate` examples. length: maximum tokens per example. held_out: share of the examples that is held
    out for evaluation. seed: random seed. checkpointing: gradient checkpointing.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    learning_rate: float = 2e-4
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 4
    accumulate: int = 1
    length: int = 512
    held_out: float = 0.05
    seed: int = 0
    checkpointing: bool = True

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[str, Any], Any]] = {
            **dict.fromkeys(("rank", "batch", "accumulate", "steps", "length"), arguments.integer(1)),
            **dict.fromkeys(("alpha", "dropout", "learning_rate", "epochs", "held_out"), arguments.number),
            "seed": arguments.integer(0, arguments.MAX_SEED),
            "checkpointing": arguments.flag,
            "targets": _names,
        }
        for name, check in checks.items():
            if (value := getattr(self, name)) is not None or name not in ("alpha", "steps"):
                object.__setattr__(self, name, check(name, value))
        for name in ("alpha", "learning_rate", "epochs"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise PlanError(f"`{name}={value}`: it must be above 0")
        for name in ("dropout", "held_out"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise PlanError(f"`{name}={value}`: expected a share, from 0 to below 1")
        if self.length < 2:
            raise PlanError(f"`length={self.length}`: an example needs at least 2 tokens")

    @property
    def scale(self) -> float:
        """LoRA's alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def steps_for(self, examples: int) -> int:
        """Number of optimizer steps for this number of examples."""
        return self.steps or max(1, ceil(self.epochs * ceil(ceil(examples / self.batch) / self.accumulate)))


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise arguments.invalid(name, value, "a list of name endings of linears")
    return tuple(value)
