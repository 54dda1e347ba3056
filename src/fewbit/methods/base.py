"""What a method is: it chooses codes on a scheme's grids, given what calibration measured."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.schemes.base import QTensor, Scheme
from fewbit.stats import Need, Stats


@dataclass
class Choice:
    """What a method chose for one weight, and what it had to do that a user should know of."""

    weight: QTensor
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Method(ABC):
    """A way to choose codes. Frozen: its fields are its options, and so its flags on the command line."""

    needs: ClassVar[Need] = Need.NOTHING

    def quantize(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Choice:
        """Codes for `w` [N, K] on grids of `scheme`. By default each weight goes to its nearest value."""
        codes, grids = scheme.nearest(w)
        return Choice(QTensor(scheme, (w.shape[0], w.shape[1]), scheme.pack(codes, grids)))


def make(name: str, options: dict[str, str] | None = None) -> Method:
    """The method `name` with options given as text; PlanError naming what it does not know or cannot read."""
    cls = registry.get("methods", name)
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, text in (options or {}).items():
        if key not in known:
            raise registry.unknown(f"option of method {name}", key, known or ["(it has none)"])
        values[key] = _read(text, known[key].default, f"--{key.replace('_', '-')}")
    made = cls(**values)
    assert isinstance(made, Method)
    return made


def option_types() -> dict[str, type]:
    """Option -> its type, over all methods."""
    return {f.name: type(f.default) for cls in registry.entries("methods").values() for f in fields(cls)}


def name_of(method: Method) -> str:
    """The name by which a method is registered."""
    return next(name for name, cls in registry.entries("methods").items() if cls is type(method))


def _read(text: str, default: Any, flag: str) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise PlanError(f"{flag}: {text!r} is neither true nor false")
        return text.lower() in ("true", "1", "yes", "on")
    try:
        return type(default)(text)
    except ValueError:
        raise PlanError(f"{flag}: {text!r} is no {type(default).__name__}") from None


def working(w: Tensor) -> Tensor:
    """`w` in the type to compute in: float64 stays, all else becomes float32. Not to be written to: it may be `w`."""
    return w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
