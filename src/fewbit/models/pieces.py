"""Where the weights of each expert lie in the fused tensors of a layer, and what checkpoints call them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.core_model_loading import WeightConverter

SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight$")  # in the conversion mapping


@dataclass(frozen=True)
class Piece:
    """The weight or bias of one linear of an expert, inside of a fused tensor whose first dimension is the expert."""

    leaf: str  # "gate_proj"
    kind: str  # "weight" or "bias"
    fused: str  # "gate_up_proj"
    rows: slice
    transposed: bool

    def of(self, fused: Any, expert: int) -> Tensor:
        """The piece of one expert. `fused` is a tensor, or a handle of a file that reads only that expert."""
        own: Tensor = fused[expert]
        return (own.T if self.transposed else own)[self.rows]


def sources(conversion: Any) -> list[str]:
    """The patterns of the tensors that a conversion of transformers reads."""
    return list(conversion.source_patterns) if isinstance(conversion, WeightConverter) else []


def leaves_of(name: str, mapping: Sequence[Any], *, gated: bool) -> tuple[str, ...]:
    """The names of an expert's linears in checkpoints: gate, up, down."""
    found: dict[str, list[str]] = {}
    for each in mapping:
        leaves = [match[1] for source in sources(each) if (match := SOURCE.search(source))]
        for target in each.target_patterns if leaves else ():
            if f"{name}.{target.rpartition('.')[2]}".endswith(target):
                found.setdefault(target.rpartition(".")[2], leaves)
    first = "gate_up_proj" if gated else "up_proj"
    usual = ["gate_proj", "up_proj"] if gated else ["up_proj"]
    return (*found.get(first, usual), *found.get("down_proj", ["down_proj"]))


def pieces_of(module: Any, leaves: tuple[str, ...]) -> Iterator[Piece]:
    """Where the weights and biases of an expert lie in the fused tensors of `module`."""
    kinds = [("weight", "", module.is_transposed), *([("bias", "_bias", False)] if module.has_bias else [])]
    for kind, ending, transposed in kinds:
        if module.has_gate:
            width = module.gate_up_proj.shape[2 if module.is_transposed else 1] // 2
            blocks, alternating = (slice(width), slice(width, None)), (slice(0, None, 2), slice(1, None, 2))
            for leaf, rows in zip(leaves[:2], blocks if module.is_concatenated else alternating, strict=True):
                yield Piece(leaf, kind, f"gate_up_proj{ending}", rows, transposed)
        else:
            yield Piece(leaves[0], kind, f"up_proj{ending}", slice(None), transposed)
        yield Piece(leaves[-1], kind, f"down_proj{ending}", slice(None), transposed)
