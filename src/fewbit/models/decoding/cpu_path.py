"""Say how a loaded model is computed on a CPU, and why not faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.models.decoding import compiled_blocks
from fewbit.nn import choose
from fewbit.nn.fused import Slice
from fewbit.nn.layers import Packed

BLOCKS, PRODUCTS, REFERENCE, UNPACKED = "whole blocks", "products", "reference", "unpacked"
_WHAT = {
    BLOCKS: "decoder blocks as one call of the CPU library each",
    PRODUCTS: "products with packed weights by the CPU library, all else by PyTorch",
    REFERENCE: "packed weights are decoded, and multiplied by PyTorch",
    UNPACKED: "no weight is packed: all by PyTorch",
}


@dataclass(frozen=True)
class CpuPath:
    """How a model is computed on this CPU.

    name: the fastest of `whole blocks`, `products`, `reference` and `unpacked` that at least one block takes. blocks:
    their number; of `whole` the library computes everything, of `half` attention and what is before it. reasons: why
    not the whole block: the names of blocks by the reason. products: the number of packed weights by kernel. slower:
    why weights are not multiplied by the CPU library: their number by the reason. unquantized: the number of weights in
    16 bits that the CPU library multiplies for a few tokens.
    """

    name: str
    blocks: int
    whole: int
    half: int
    reasons: dict[str, list[str]]
    products: dict[str, int]
    slower: dict[str, int]
    unquantized: int = 0

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The rows of a table: what, and how."""
        kernels = ", ".join(f"{count} by {kernel}" for kernel, count in self.products.items())
        found = [("path", f"{self.name}: {_WHAT[self.name]}")]
        if self.name != UNPACKED:
            half = f", and {self.half} up to the end of attention" if self.half else ""
            found += [("whole blocks", f"{self.whole} of {self.blocks}{half}"), ("packed weights", kernels)]
            found += [("not whole", f"{_short(names)}: {reason}") for reason, names in self.reasons.items()]
            found += [("not by cpu", f"{count} weights: {reason}") for reason, count in self.slower.items()]
            found += [("16-bit weights", f"{self.unquantized} by the CPU library")] if self.unquantized else []
        return found


def cpu_path(model: Any) -> CpuPath:
    """How `model` is computed. Runs a few tokens through it, to see which blocks the library computes."""
    packed = [each for each in model.modules() if isinstance(each, Packed) and not isinstance(each, Slice)]
    packed = [each for each in packed if each.kernel is not None]
    if not packed:
        return CpuPath(UNPACKED, _count(model), 0, 0, {}, {}, {})
    try:
        whole, half, why = compiled_blocks.split(model)
        blocks = len({*whole, *half, *why})
    except PlanError as error:  # a model without a list of blocks
        whole, half, why, blocks = [], [], {"the model": error.message}, 0
    kernels = _counted(str(each.kernel.name) for each in packed if each.kernel)
    slower = _counted(_why_not(each) for each in packed if each.kernel and each.kernel.name != "cpu")
    name = BLOCKS if whole or half else PRODUCTS if "cpu" in kernels else REFERENCE
    reasons: dict[str, list[str]] = {}
    for block, reason in why.items():
        reasons.setdefault(reason, []).append(block)
    unquantized = len(compiled_blocks.unquantized(model))
    return CpuPath(name, blocks, len(whole), len(half), reasons, kernels, slower, unquantized)


def would_round(model: Any) -> bool:
    """Whether a model that was loaded for a measurement on a CPU is generated with activations that are rounded."""

    def rounds(packed: Packed) -> bool:
        if packed.kernel is None or packed.forced is not None or packed.prepared[0].device.type != "cpu":
            return False
        usual = choose.expected(packed.codec, packed.shape, packed.prepared[0].device, packed.compute or packed.dtype)
        return bool(packed.kernel.activations == "exact" != registry.get("kernels", usual)().activations)

    return any(rounds(each) for each in model.modules() if isinstance(each, Packed) and not isinstance(each, Slice))


def _count(model: Any) -> int:
    return int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0) or 0)


def _why_not(packed: Packed) -> str:
    if packed.forced is not None:
        return f"the kernel {packed.forced} was asked for"
    dtype, device = packed.compute or packed.dtype, packed.prepared[0].device
    reason = choose.why_not(registry.get("kernels", "cpu")(), packed.codec, packed.shape, device, dtype)
    return reason or "it gave other products than the reference"


def _counted(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


def _short(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
