"""Whether modules are still as they were when the CPU library was given their weights and numbers.

Nothing tells when a weight is written to through `weight.data`, replaced, or moved (`share_memory`). So each step
compares the small weights, which the library has copies of, by their bytes, and the packed ones by their addresses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models.decoding.stand_in import PLACE
from fewbit.nn.layers import Packed

_NUMBERS = (bool, int, float)


class Known:
    """What the library was told of `modules`. Packed weights are read in place, all else was copied."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        packed = [each for each in modules if isinstance(each, Packed)]
        plain = [each for each in modules if not isinstance(each, Packed)]
        self.owned = [vars(each) for each in modules]
        self.code = [(kind, kind.forward) for kind in {type(each) for each in modules}]
        self.values = [(vars(each).items(), _values(each).items()) for each in plain]
        self.drops = [vars(each) for each in plain if _drops(each)]
        owners: list[tuple[Any, str]] = [(each._parameters, name) for each in plain for name in each._parameters]
        owners += [(each._buffers, name) for each in plain for name, own in each._buffers.items() if _is_small(own)]
        owners += [(each._parameters, "bias") for each in packed]
        self.small = [(own, name, *_content(own.get(name))) for own, name in owners]
        weights = [each for each in packed if "weight" in each._parameters]
        held: list[tuple[Any, str]] = [(each._parameters, "weight") for each in weights]
        held += [(each._buffers, name) for each in weights for name in each.kept]
        held += [(each._buffers, "permutation") for each in weights if each.permutation is not None]
        self.places = [(own, name, own[name], _place(own[name])) for own, name in held]

    def same(self) -> bool:
        """Whether nobody has changed anything, and no dropout is on. Plain loops: this runs for each token."""
        for own in self.owned:
            if "forward" in own:
                return False
        for kind, forward in self.code:
            if kind.forward is not forward:
                return False
        for now, before in self.values:
            if not before <= now:
                return False
        for own in self.drops:
            if own["training"]:
                return False
        for own, name, weight, place in self.places:
            if own.get(name) is not weight or weight.data_ptr() != place:
                return False
        for own, name, small, place, view, content in self.small:
            if own.get(name) is not small:
                return False
            # The view is of memory that is gone if the weight has another place.
            if small is not None and (small.data_ptr() != place or view.tobytes() != content):
                return False
        return True


def _values(module: nn.Module) -> dict[str, Any]:
    """The numbers and the functions, such as activations, that a module has as attributes."""
    found = {name: value for name, value in vars(module).items() if type(value) in _NUMBERS or callable(value)}
    return {name: value for name, value in found.items() if name not in ("training", PLACE)}


def _drops(module: nn.Module) -> bool:
    """Whether a module drops numbers at random while it trains."""
    dropout = isinstance(module, nn.Dropout) and module.p > 0
    return dropout or any(value for name, value in _values(module).items() if "drop" in name)


def _is_small(buffer: Tensor | None) -> bool:
    """Whether a buffer may be a factor or a vector. One of more dimensions is a mask or a table."""
    return buffer is not None and buffer.dim() < 2


def _place(weight: Tensor | None) -> int | None:
    """Where a weight is; None, which it never is, for one that is no single run of bytes in main memory."""
    return weight.data_ptr() if weight is not None and weight.is_cpu and weight.is_contiguous() else None


def _content(weight: Tensor | None) -> tuple[Tensor | None, int | None, Any, bytes]:
    """A weight, where it is, a view of its bytes, and their copy."""
    if weight is None or (place := _place(weight)) is None:
        return weight, None, None, b""
    view = weight.detach().flatten().view(torch.uint8).numpy()
    return weight, place, view, view.tobytes()
