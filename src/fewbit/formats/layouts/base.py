"""The interface of a layout: which float tensors a quantized checkpoint stands for, and how each is decoded.

find: config, headers of all files  ->  name -> Packed
Packed.decode: its tensors, rows    ->  values, float32
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import Codec, PartSpec, QTensor

# Lazy handles, by role. A handle has `handle[index]`, and reads only what the index selects.
Handles = Mapping[str, Any]
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Held:
    """A quantized weight in a file. codec, shape [N, K]: as the headers say.

    read: the weight. as_stored: the codec as the data decides, and whether the columns are permuted; FormatError if
    fewbit would round its scales.
    """

    codec: Codec
    shape: tuple[int, int]
    read: Callable[[Handles], QTensor]
    as_stored: Callable[[Handles], tuple[Codec, bool]]


@dataclass(frozen=True)
class Packed:
    """A float tensor that a checkpoint stores quantized.

    shape: of the float tensor. kind: what its numbers are, for people: "FP8, block 128x128". parts: role -> name of
    the stored tensor. scales: roles whose values must be finite. positive: roles whose values must be above 0. unused:
    names of stored tensors that have no meaning without the quantized weight, such as scales of activations. decode:
    the values, float32, of a slice of the first dimension. by_rows: whether `decode` reads only what a slice needs.
    weight: the quantized weight that it is decoded from, where fewbit can keep it packed.
    """

    shape: tuple[int, ...]
    kind: str
    parts: Mapping[str, str]
    decode: Callable[[Handles, slice], Tensor]
    scales: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    by_rows: bool = True
    weight: Held | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Layout(ABC):
    """How one tool stores quantized weights. It has no state."""

    quant_method: ClassVar[str]  # the layout's name in the quantization_config
    # Whether it decodes only the weights that no scheme holds, and fewbit's format of this name decodes the others.
    beside_format: ClassVar[bool] = False

    @abstractmethod
    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec], read: Read) -> dict[str, Packed]:
        """Name -> packed tensor, for every quantized tensor of a checkpoint that the layout decodes.

        names: the name and header of each tensor. read: gives the data of a tensor, for what no header says.
        FormatError that names the tensor if one is missing, or has another dtype or shape than expected.
        """


def is_float(spec: PartSpec) -> bool:
    """Whether a header is of a float that is not itself a small code: at least 16 bits."""
    return spec.dtype.is_floating_point and spec.dtype.itemsize >= 2


def is_fp8(spec: PartSpec) -> bool:
    return spec.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
