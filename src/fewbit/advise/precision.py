"""A number of parameters, such as 7B, times the bits of each format: the table that everybody knows, and the true one.

By the rule of thumb 7B weigh 28 GB in float32, 14 in float16, 7 in 8 bits and 3.5 in 4: parameters times bits. A real
format keeps scales beside its codes. Here their true bits come from `part_specs` of a weight of 4096 x 4096, all
parameters taken as quantized; a model's embeddings and norms, which folders keep in 16 bits, come on top, and
`fewbit estimate MODEL` counts them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fewbit.advise import cards
from fewbit.brief import brief
from fewbit.errors import PlanError
from fewbit.plans import mixtures, plan
from fewbit.schemes.base import parse

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([BbMm])")
_SHAPE = (4096, 4096)
_NOMINAL = (("FP32", 32), ("FP16", 16), ("INT8", 8), ("INT4", 4))


@dataclass(frozen=True)
class Format:
    """One row: `nominal` bits by the rule of thumb, None where there is none, and true bits. Bytes of all weights."""

    name: str
    nominal: int | None
    bits: float
    nbytes: int
    card: str | None


@brief
@dataclass(frozen=True)
class Precision:
    """What `fewbit estimate 7B` says: `guide` by the rule of thumb, `formats` as they are."""

    name: str
    parameters: int
    guide: tuple[Format, ...]
    formats: tuple[Format, ...]


def parameters(text: str) -> int | None:
    """The number that `7B`, `1.1B` or `125M` means; None for other text, PlanError for none at all."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    found = round(float(match[1]) * (1e9 if match[2] in "Bb" else 1e6))
    if not 0 < found < 10**15:
        raise PlanError(f"{text} is no number of parameters", "Write it as 7B, 1.1B or 125M.")
    return found


def like_a_size(text: str) -> bool:
    """Whether `text`, which may be no size, begins as one: 7X, 7, 1.1GB."""
    return re.match(r"\d+(\.\d+)?\s*[A-Za-z]{0,2}$", text) is not None


def table(name: str, count: int) -> Precision:
    """The table for a model of `count` parameters."""
    guide = tuple(_row(kind, bits, bits, count) for kind, bits in _NOMINAL)
    formats = [_row("bf16", 16, 16, count)]
    for preset in plan.PRESETS.values():
        scheme = preset.rules[0].scheme
        assert scheme is not None
        if scheme.startswith(mixtures.PREFIX):
            continue
        formats.append(_row(f"{preset.name} ({scheme})", None, bits_of(scheme), count))
    kinds = dict.fromkeys(mixture.base for mixture in mixtures.MIXTURES.values())
    formats += [_row(f"{kind} throughout", None, bits_of(kind), count) for kind in kinds]
    return Precision(name, count, guide, tuple(sorted(formats, key=lambda row: -row.bits)))


def _row(name: str, nominal: int | None, bits: float, count: int) -> Format:
    nbytes = round(count * bits / 8)
    return Format(name, nominal, bits, nbytes, cards.smallest(nbytes))


def bits_of(scheme: str) -> float:
    """Bits per weight of a scheme, for a 4096 x 4096 weight."""
    return 8 * parse(scheme).nbytes(_SHAPE) / (_SHAPE[0] * _SHAPE[1])
