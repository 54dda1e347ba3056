"""The tensors of a conversion. Each is made when it is read, so that a few of them are in memory at a time."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FormatError, PlanError
from fewbit.formats.base import Format
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.formats.dense import Dense
from fewbit.models import experts, stored
from fewbit.models.packing import Weight
from fewbit.models.pieces import Piece
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline.settled import Settled
from fewbit.schemes.base import PartSpec
from fewbit.schemes.exact import Form


def tensors(
    settled: Settled, weights: Mapping[str, Weight], forms: Mapping[str, Form], fused: Mapping[str, Place]
) -> Checkpoint:
    """The tensors of the quantized weights, made when they are read."""
    made, format = Checkpoint([]), settled.resolved.format
    joined: dict[str, list[tuple[Place, _Part]]] = {}
    for module, form in forms.items():
        converted = _Converted(module, weights[module], form, settled)
        for suffix, spec in format.specs(weights[module].shape, form.scheme).items():
            part, name = _Part(converted, suffix, spec), settled.part(module, suffix)
            if module in fused:
                joined.setdefault(name, []).append((fused[module], part))
            else:
                made.add(name, spec, part)
    for name, parts in joined.items():
        place, part = parts[0]
        spec = PartSpec((place.experts, place.rows, *part.spec.shape[1:]), part.spec.dtype)
        made.add(name, spec, _Joined(parts, spec))
    return made


@dataclass(frozen=True)
class Place:
    """Where the weight of a linear lies in a fused parameter: `piece` of the expert `number`.

    experts, rows: of the whole parameter, its rows as outputs of linears.
    """

    name: str
    experts: int
    rows: int
    number: int
    piece: Piece


def places(skeleton: Skeleton, format: Format, found: Container[str]) -> dict[str, Place]:
    """Module -> its place, of the linears `found`, for a format that stores all experts of a layer in one tensor.

    PlanError unless the experts have the layout of gpt-oss: transposed in transformers, with gate and up alternating.
    """
    if isinstance(format, Dense) or type(format).find_fused is Format.find_fused:
        return {}
    placed = dict[str, Place]()
    for path, module in skeleton.model.named_modules():
        for leaf, shape in module.shapes.items() if isinstance(module, experts.SeparateExperts) else ():
            for name, number, piece in experts.split(skeleton.model, f"{path}.{leaf}"):
                linear = name.removesuffix(".weight")
                if piece.kind != "weight" or linear not in found:
                    continue
                if not piece.transposed or (piece.rows.step is None and piece.rows != slice(None)):
                    kind = type(module).__name__.removeprefix("Separate")
                    raise PlanError(
                        f"{format.name} files hold experts whose rows of gate and up alternate, as in gpt-oss, and "
                        f"{linear} belongs to {kind}",
                        "`to=compressed-tensors` holds mxfp4 weights of any model.",
                    )
                placed[linear] = Place(f"{path}.{leaf}", shape[0], shape[2], number, piece)
    stored.fuse_experts(skeleton, found)
    return placed


class _Converted:
    """The tensors of one weight in the target format. They are made together, and each is kept until it is read."""

    def __init__(self, module: str, weight: Weight, form: Form, settled: Settled) -> None:
        self.module, self.weight, self.form, self.settled = module, weight, form, settled
        self._waiting: dict[str, Tensor] = {}

    def take(self, suffix: str) -> Tensor:
        if suffix not in self._waiting:
            self._waiting = self._made()
        return self._waiting.pop(suffix)

    def _made(self) -> dict[str, Tensor]:
        moved = self.form.of(self.weight.read())
        if isinstance(moved, str):
            raise FormatError(f"{self.module} changed while it was converted: {moved}")
        settled = self.settled
        return settled.resolved.format.lay_out(moved, settled.config, settled.stored_as[self.module])


@dataclass(frozen=True)
class _Part:
    """A lazy handle of one of these tensors."""

    converted: _Converted
    suffix: str
    spec: PartSpec

    def __getitem__(self, index: Any) -> Tensor:
        return self.converted.take(self.suffix)[index]

    def get_shape(self) -> list[int]:
        return list(self.spec.shape)


@dataclass(frozen=True)
class _Joined:
    """A lazy handle of a tensor of a fused parameter, which holds those of all experts of a layer."""

    parts: Sequence[tuple[Place, _Part]]
    spec: PartSpec

    def __getitem__(self, index: Any) -> Tensor:
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype, device="cpu")
        for place, part in self.parts:
            whole[place.number, place.piece.rows] = part[...]
        return whole[index]

    def get_shape(self) -> list[int]:
        return list(self.spec.shape)
