"""What a model can be converted to: the formats that fewbit writes, their variants, and `dense`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.formats.base import Format
from fewbit.formats.dense import Dense

DENSE = "dense"


@dataclass(frozen=True)
class Target:
    """What a model is converted to: a format, and the variant of its layout; "": the one that the format prefers."""

    format: Format
    variant: str = ""

    @property
    def keys(self) -> Mapping[str, Any]:
        """The keys of the quantization config that choose the variant."""
        return self.format.variants[self.variant] if self.variant else {}


def targets() -> dict[str, Target]:
    """Name -> target: `dense`, each format that fewbit writes, and its variants, such as `gptq-v1`."""
    found = {DENSE: Target(Dense())}
    for name, entry in registry.entries("formats").items():
        if entry.read_only and entry.why_not_moved is Format.why_not_moved:
            continue
        found[name] = Target(entry())
        found |= {f"{name}-{variant}": Target(entry(), variant) for variant in entry.variants}
    return found


def find(to: str) -> Target:
    """The target `to`. PlanError with the nearest names if there is none."""
    known = targets()
    if to not in known:
        raise registry.unknown("format", to, known)
    return known[to]


def is_file(out: str | Path, target: Target, to: str) -> bool:
    """Whether the target `to` is one file rather than a folder. PlanError if the suffix of `out` does not match."""
    suffix = target.format.suffix
    if suffix and Path(out).suffix != suffix:
        raise PlanError(f"{out}: `to={to}` makes one {suffix} file", f"Give an `out` that ends in {suffix}.")
    if not suffix and Path(out).suffix == ".gguf":
        raise PlanError(f"{out} would be a GGUF file, but `to={to}` makes a folder", "Give another `out`.")
    return bool(suffix)
