"""No quantization: every weight is an ordinary tensor. A target of `fewbit convert`, not a format of plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fewbit.formats.base import Format, Shape, Stored
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec, QTensor, Scheme


class Dense(Format):
    """Stores no quantized weight. It is not registered, so no plan can name it."""

    name: ClassVar[str] = "dense"
    quant_method: ClassVar[str] = ""

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        return "dense files store no quantized weights"

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        raise NotImplementedError

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        raise NotImplementedError

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        raise NotImplementedError

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        return {}

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        raise NotImplementedError

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        return {}
