"""The size that an output is to have, and the widths that were chosen for it. Importing it is quick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fewbit import checks
from fewbit.brief import brief
from fewbit.errors import PlanError
from fewbit.settings import Settings, setting


def _bits(name: str, value: Any) -> float:
    if (found := checks.above_0(name, value)) > 16:
        raise checks.invalid(name, value, "a number above 0 and up to 16, the bits of a weight that is not quantized")
    return found


@dataclass(frozen=True)
class Budget(Settings):
    """How large an output may be: one of `bits`, `size` and `fit`. Without one, the plan decides. PlanError for two."""

    bits: float | None = setting(
        None,
        _bits,
        "Average bits per quantized weight, scales included; fewbit chooses each weight's width. Default: the plan's.",
    )
    size: str | int | None = setting(
        None,
        checks.size,
        "Largest total size of the weight files, such as 6GB; fewbit chooses each weight's width.",
    )
    fit: str | int | None = setting(
        None,
        checks.size,
        "Memory for weights, KV cache and activations, such as 8GB; fewbit chooses each weight's width.",
    )
    context: int | None = setting(
        None, checks.integer(1), "With `fit`: tokens in the KV cache. Default: the model's context, at most 4096."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"`{name}`" for name in ("bits", "size", "fit") if getattr(self, name) is not None]
        if given[1:]:
            raise PlanError(f"{' and '.join(given)} are given", "Give one of them.")
        if self.context is not None and self.fit is None:
            hint = "Omit `context`, or add `fit`: only `fit` counts a KV cache."
            raise PlanError("`context` is given without `fit`", hint)

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self.bits is not None or self.size is not None or self.fit is not None

    def __str__(self) -> str:
        name = next(name for name in ("bits", "size", "fit") if getattr(self, name) is not None)
        return f"`{name}={getattr(self, name)}`"


@brief
@dataclass(frozen=True)
class Point:
    """A choice of widths: bits per quantized weight, bytes of all tensors in files, KL divergence in nats per token.

    kl: as predicted. costs: the sum of the weights' costs, which `kl` is computed from. measured: on held-out windows;
    None if it was not measured. what: the scheme that all weights have, if they have the same one; empty otherwise.
    chosen: the one used.
    """

    bits: float
    output_bytes: int
    kl: float
    what: str = ""
    chosen: bool = False
    costs: float = 0.0
    measured: float | None = None


@brief
@dataclass(frozen=True)
class Allocation:
    """The widths that were chosen for a size.

    asked: the size. kl: the predicted KL divergence from the original in nats per token. measured: that of the output
    on held-out windows of the calibration text; None in a preview. costs: the sum of the weights' costs. factor,
    exponent, least: the curve that gives `kl` for `costs` (`plans/correction.py`), through measured points of `curve`.
    schemes: scheme -> number of weights. bits, output_bytes: as in `Point`. tokens: the costs were measured on so many.
    held_out: the points were measured on so many. curve: other sizes, and plans of one width, by size.
    """

    asked: str
    kl: float
    bits: float
    output_bytes: int
    schemes: dict[str, int]
    tokens: int
    curve: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    costs: float = 0.0
    factor: float = 1.0
    exponent: float = 1.0
    least: float = 0.0
    held_out: int = 0
    measured: float | None = None

    def with_measured(self, kl: float) -> Allocation:
        """A copy that says what was measured of the output."""
        curve = tuple(replace(point, measured=kl) if point.chosen else point for point in self.curve)
        return replace(self, measured=kl, curve=curve)
