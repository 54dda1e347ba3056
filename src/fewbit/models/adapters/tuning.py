"""The settings of a LoRA training, with their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from fewbit.checks import MAX_SEED, flag, integer, invalid, number
from fewbit.errors import PlanError
from fewbit.settings import Settings, setting


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise invalid(name, value, "a list of name endings of linears")
    return tuple(value)


@dataclass(frozen=True)
class Tuning(Settings):
    """Settings of a LoRA training. PlanError for a value out of range."""

    rank: int = setting(8, integer(1), "LoRA rank.")
    alpha: float | None = setting(None, number, "LoRA alpha; the scale is alpha / rank. Default: twice the rank.")
    dropout: float = setting(0.0, number, "LoRA dropout: share of inputs set to 0 in training.")
    targets: tuple[str, ...] = setting(
        (), _names, "Linears to adapt, by the ends of their names: q_proj,v_proj. Default: all but the head."
    )
    learning_rate: float = setting(
        2e-4, number, "Peak learning rate (linear warm-up over 5 % of the steps, then linear decay to 0)."
    )
    epochs: float = setting(1.0, number, "Passes over the training examples.")
    steps: int | None = setting(None, integer(1), "Optimizer steps. Default: as `epochs` says.")
    batch: int = setting(4, integer(1), "Batch size: examples per forward pass.")
    accumulate: int = setting(1, integer(1), "Gradient accumulation steps: batches per optimizer step.")
    length: int = setting(512, integer(1), "Maximum tokens of an example.")
    held_out: float = setting(0.05, number, "Share of the examples kept for evaluation.")
    seed: int = setting(0, integer(0, MAX_SEED), "Random seed.")
    checkpointing: bool = setting(True, flag, "Gradient checkpointing: less memory, slower.")

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def steps_for(self, examples: int, processes: int = 1) -> int:
        """Number of optimizer steps for this number of examples, of which each process takes its own batches."""
        batches = ceil(ceil(examples / self.batch) / processes)
        return self.steps or max(1, ceil(self.epochs * ceil(batches / self.accumulate)))
