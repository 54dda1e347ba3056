"""Stack several quantized weights into one, so that q, k and v (or gate and up) take one multiplication.

There are two ways:

    [W_0; W_1; ...] : codes [N_0, ...], [N_1, ...] -> codes [N_0 + N_1, ...]          by rows
                                                   -> 0.codes, 1.codes, ...           as segments

By rows, if every part consists of one piece per row of the weight: the parts are concatenated. The result is an
ordinary weight of the same codec, and all its kernels support it. As segments otherwise: NF4's blocks may cross rows,
and its double-quantized scales belong to the whole tensor. Each weight then keeps its parts and is decoded on its own.
In both cases the values stay the same, and `unstack` returns every part byte for byte.

>>> from fewbit.schemes.base import parse
>>> def packed(spec, n):
...     scheme, w = parse(spec), torch.arange(n * 64.0).view(n, 64)
...     return QTensor(scheme, (n, 64), scheme.pack(*scheme.nearest(w)))
>>> whole = stack([packed("int4-g32-sym", 3), packed("int4-g32-sym", 2)])
>>> str(whole.codec), whole.shape, tuple(whole.parts["scale"].shape)
('int4-g32-sym', (5, 64), (5, 2))
>>> sorted(stack([packed("nf4-b128", 4), packed("nf4-b128", 2)]).parts)
['0.absmax', '0.codes', '1.absmax', '1.codes']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import ALL, Codec, PartSpec, QTensor


@dataclass(frozen=True)
class Stacked(Codec):
    """Weights stacked as segments. `segments`: codec and number of rows of each, from the top."""

    segments: tuple[tuple[Codec, int], ...]

    def __str__(self) -> str:
        return " over ".join(f"{codec} x {rows}" for codec, rows in self.segments)

    @property
    def payload(self) -> str:
        return f"0.{self.segments[0][0].payload}"

    @property
    def trainable(self) -> str:
        return "its segments are trained one by one"

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        return {
            f"{i}.{name}": spec
            for i, (codec, rows) in enumerate(self.segments)
            for name, spec in codec.part_specs((rows, shape[1])).items()
        }

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if shape[0] != (rows := sum(rows for _, rows in self.segments)):
            return f"its segments have {rows} rows, not {shape[0]}"
        return next((why for codec, n in self.segments if (why := codec.why_not((n, shape[1])))), None)

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        begin, end, _ = rows.indices(shape[0])
        values, top = [], 0
        for i, (codec, n) in enumerate(self.segments):
            own = slice(max(begin - top, 0), min(end - top, n))
            if own.start < own.stop:
                values.append(codec.dequantize(_own(parts, i), (n, shape[1]), dtype, own))
            top += n
        return torch.cat(values) if len(values) != 1 else values[0]


def stack(weights: Sequence[QTensor]) -> QTensor:
    """The weights stacked in this order. They must have the same K and the same column permutation."""
    codecs, rows = {w.codec for w in weights}, sum(w.shape[0] for w in weights)
    first, shape = weights[0], (rows, weights[0].shape[1])
    if len(codecs) == 1 and all(w.codec.by_rows(w.shape) for w in weights):
        return replace(concatenated(weights), permutation=first.permutation)
    parts = {f"{i}.{name}": part for i, w in enumerate(weights) for name, part in w.parts.items()}
    return QTensor(Stacked(tuple((w.codec, w.shape[0]) for w in weights)), shape, parts, first.permutation)


def concatenated(weights: Sequence[QTensor]) -> QTensor:
    """Weights of one codec and shape with their parts concatenated, without a permutation.

    Each weight is the same share of every part, also where parts do not consist of rows. Only then the result is not
    one weight of this codec, but a list of weights.
    """
    first = weights[0]
    parts = {name: torch.cat([w.parts[name] for w in weights]) for name in first.parts}
    return QTensor(first.codec, (sum(w.shape[0] for w in weights), first.shape[1]), parts)


def unstack(weight: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """The inverse of `stack`: the weights that `weight` was made of. `rows`: the number of rows of each."""
    if isinstance(weight.codec, Stacked):
        return [
            QTensor(codec, (n, weight.shape[1]), _own(weight.parts, i), weight.permutation)
            for i, (codec, n) in enumerate(weight.codec.segments)
        ]
    cut = {name: part.split([len(part) * n // weight.shape[0] for n in rows]) for name, part in weight.parts.items()}
    return [
        QTensor(weight.codec, (n, weight.shape[1]), {name: part[i] for name, part in cut.items()}, weight.permutation)
        for i, n in enumerate(rows)
    ]


def _own(parts: Mapping[str, Tensor], segment: int) -> dict[str, Tensor]:
    return {name.partition(".")[2]: part for name, part in parts.items() if name.startswith(f"{segment}.")}
