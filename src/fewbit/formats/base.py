"""What a format is: how quantized tensors are named and laid out in files. It changes no number.

A format that lives in a Hugging Face folder (safetensors plus a `quantization_config`) stores each weight as a few
tensors named `<module>.<suffix>`; `lay_out` and `read` turn parts into those and back, `specs` tells their sizes
without data.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fewbit import registry
from fewbit.errors import FormatError
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec, QTensor, Scheme

Shape = tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """A weight to be stored: the module it belongs to, its shape [N, K] and the scheme it will have."""

    module: str
    shape: Shape
    scheme: Scheme


class Format(ABC):
    """Stateless: one instance serves every file."""

    name: ClassVar[str]
    quant_method: ClassVar[str]  # its name in a config.json's quantization_config
    suffix: ClassVar[str] = (
        ""  # of the one file that holds a whole model, embeddings and head quantized too; else a folder
    )
    told_by: ClassVar[tuple[str, ...]] = ()  # suffixes of small tensors that say what headers do not, such as the shape

    @abstractmethod
    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        """None if one weight of this shape and scheme can be stored, else a sentence that says why not."""

    def why_not_together(self, weights: Sequence[Stored]) -> str | None:
        """None if these weights can share one file, else a sentence that says why not. By default: one scheme."""
        schemes = sorted({str(weight.scheme) for weight in weights})
        return f"{self.name} files hold one scheme for all tensors, not {', '.join(schemes)}" if schemes[1:] else None

    @abstractmethod
    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        """Suffix -> shape and dtype of each tensor that stores such a weight."""

    @abstractmethod
    def lay_out(self, weight: QTensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Suffix -> tensor, as `specs` describes and a reader of `config` expects."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        """The weight that the tensors of `module` hold; FormatError naming it where they contradict one another."""

    @abstractmethod
    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """The `quantization_config` for a file of these weights, in which the linears `skipped` stay as they are.

        dtype: that of the original weights, and so of activations; bfloat16 by default.
        """

    @abstractmethod
    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, told: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        """Scheme and shape [N, K] of the weight of `module`, from its tensors' headers and the data of those in
        `told_by`; FormatError naming it where they contradict one another."""

    def scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        """The scheme that `config` asks for where a model is quantized as it is loaded; None where that cannot be."""
        return None

    def activations(self, names: Mapping[str, PartSpec]) -> dict[str, PartSpec]:
        """Module -> spec of the scales that an activation function's outputs are divided by, among these tensors."""
        return {}

    @abstractmethod
    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        """Module -> suffix -> spec of every quantized weight among the tensors of a checkpoint, from headers alone.

        FormatError where the config promises something that cannot be, or a weight lacks a tensor.
        """


def by_quant_method(name: str) -> Format | None:
    """The format that goes by that name in a quantization_config; None if fewbit has none."""
    return next((made() for made in registry.entries("formats").values() if made.quant_method == name), None)


def for_module(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """`config` as it holds for one module: the first pattern of gptqmodel's `dynamic` that matches overrides it."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise FormatError(f"dynamic in the quantization config is {dynamic!r}; an object of patterns expected")
    for pattern, said in dynamic.items():
        try:
            found = re.match(pattern.removeprefix("-:").removeprefix("+:"), module)
        except re.error as error:
            raise FormatError(f"dynamic in the quantization config: {pattern!r} is no pattern: {error}") from None
        if found and pattern.startswith("-:"):
            return config
        if found:
            if not isinstance(said, Mapping):
                raise FormatError(f"dynamic in the quantization config: {pattern!r} has {said!r}; an object expected")
            return {**config, **{key: value for key, value in said.items() if value is not None}}
    return config
