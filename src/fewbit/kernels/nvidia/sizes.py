"""Which sizes of the CUDA kernels serve how many rows of x: those measured on an H200, or those measured on this card.

`fewbit doctor --tune` measures a card (`tuning.py`) and keeps what is fastest there in one file for each card, which
this module writes and reads. A file of another card, driver, PyTorch or version of the kernels is not used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import FewbitError
from fewbit.kernels.nvidia import in_cuda
from fewbit.kernels.nvidia.in_cuda import Sizes
from fewbit.kernels.nvidia.layout import E2M1, MINIMUM, SUPER_MINIMUM, TABLE, Recipe
from fewbit.system.cache import cache_folder, existing
from fewbit.system.files import read_json, replace_text
from fewbit.system.kept import label

# Pairs: the largest number of rows of x, and the best sizes up to it. Without sizes, and beyond the last pair, the
# weight is dequantized for cuBLAS. Of several sizes, the first that keep the GPU full for the weight's rows are used.
Ranges = tuple[tuple[int, tuple[Sizes, ...]], ...]

# Measured: see benchmarks/results/2026-11-h200.md.
H200: Ranges = (
    (8, (Sizes(8, 2, 1, 2), Sizes(8, 1, 1, 2), Sizes(8, 1, 1, 3))),
    (16, (Sizes(4, 2, 2, 4), Sizes(8, 2, 2, 2))),
    (32, (Sizes(8, 2, 4, 1, 1),)),
    (64, (Sizes(16, 1, 8, 1, 1),)),
    (128, (Sizes(8, 2, 16, 1, 1),)),
    (192, (Sizes(8, 2, 12, 1, 1),)),
    (256, (Sizes(8, 2, 16, 1, 1),)),
)
# The same for Hopper, whose copy engine brings x into shared memory; for fewer rows the kernels above are faster.
HOPPER: Ranges = (
    *H200[:3],
    (64, (Sizes(8, 2, 8, 1, 1, 1), Sizes(8, 1, 8, 1, 1, 1))),
    (128, (Sizes(8, 1, 16, 1, 1, 1),)),
    (192, (Sizes(8, 1, 24, 1, 1, 2),)),
    (256, (Sizes(8, 1, 32, 1, 1, 2),)),
    (384, (Sizes(8, 1, 24, 1, 1, 2),)),
    (512, (Sizes(8, 1, 32, 1, 1, 2),)),
    (1024, (Sizes(8, 1, 32, 1, 1, 2),)),  # these two if `most` allows
    (2048, (Sizes(8, 1, 32, 1, 1, 2),)),
)
# The same for up to 8 rows of x and weights of FP4, which take more instructions.
_FP4 = (8, (Sizes(8, 1, 1, 3), Sizes(8, 2, 1, 2), Sizes(8, 1, 1, 2)))
# The same for up to 64 rows and weights of 2 bits in groups of 16, for which two tiles a warp take too many registers.
_TWO_BITS = (64, (Sizes(8, 1, 8, 1, 1, 1),))
_FULL = 0.8  # share of the GPU's block slots that counts as full, the last round included

ENDS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 1024, 2048)  # the most rows of each range that is measured
MEASURED = ("int4-g128", "q4_k", "nf4-b64", "mxfp4")  # each for all weights of its kind, see `measured`
MOST = 3  # sizes of a range


def built_in(how: Recipe, hopper: bool) -> Ranges:
    """The sizes that were measured on an H200."""
    found = tuple(each for each in HOPPER if each[0] <= most(how)) if hopper else H200
    if hopper and how.bits == 2 and how.sub == 16:
        found = tuple(_TWO_BITS if each[0] == 64 else each for each in found)
    return (_FP4, *found[1:]) if how.level == E2M1 else found


def costly(how: Recipe) -> bool:
    """Whether decoding takes more instructions than that of other kinds.

    Numbers are computed in float32 (codes of 8 bits, groups of 16 columns, groups with a minimum), or codes have a high
    plane beside 4 bits.
    """
    in_float32 = how.low == 8 or how.sub == 16 or how.offset in (MINIMUM, SUPER_MINIMUM)
    return in_float32 or (how.low == 4 and how.bits > 4)


def most(how: Recipe) -> int:
    """The most rows for which the kernel for Hopper was no slower than cuBLAS with the dequantized weight."""
    if costly(how):
        return 512
    return 1024 if how.level == TABLE else 2048


def candidates(rows: int, hopper: bool) -> tuple[Sizes, ...]:
    """The sizes that may be best up to so many rows.

    At least a quarter of a block's rows of x are filled. W is read at most twice, or eight times above 256 rows.
    """
    known = dict.fromkeys(sizes for table in (H200, HOPPER) for _, several in table for sizes in several)
    passes = 2 if rows <= 256 else 8
    return tuple(
        sizes
        for sizes in known
        if (hopper or not sizes.cluster) and rows <= passes * 8 * sizes.of_x and 8 * sizes.of_x <= 4 * max(rows, 8)
    )


def dequantizes(rows: int) -> bool:
    """Whether it may be best for so many rows to dequantize the weight."""
    return rows >= 64


def fullest(several: tuple[Sizes, ...], n: int, how: Recipe, device: torch.device) -> Sizes | None:
    """Those of `several` sizes that are used for a weight of n rows; None to dequantize it."""
    if not several:
        return None
    found = max(several, key=lambda sizes: min(_FULL, in_cuda.fullness(sizes, n, device)))
    return in_cuda.fitting(found, how, device)


def within(ranges: Ranges, rows: int) -> tuple[Sizes, ...]:
    """The sizes for so many rows of x."""
    return next((several for most, several in ranges if rows <= most), ())


def best(m: int, n: int, how: Recipe, device: torch.device) -> Sizes | None:
    """The sizes for m rows of x and a weight of n rows; None to dequantize it."""
    own = tuned(device)
    ranges = own.ranges[measured(how)] if isinstance(own, Tuned) else built_in(how, in_cuda.hopper(device))
    return fullest(within(ranges, m), n, how, device)


def measured(how: Recipe) -> str:
    """The scheme whose measured sizes weights of this kind use."""
    if costly(how):
        return "q4_k"
    return {TABLE: "nf4-b64", E2M1: "mxfp4"}.get(how.level, "int4-g128")


@dataclass(frozen=True)
class Card:
    """What a measurement depends on. driver: the CUDA version of the driver. kernels: a digest of their sources."""

    name: str
    capability: str
    driver: int
    torch: str
    kernels: str

    @property
    def entry(self) -> str:
        """The name of the file in the cache."""
        return f"kernels/{re.sub('[^A-Za-z0-9]+', '-', self.name)}.json"


@dataclass(frozen=True)
class Tuned:
    """What was measured on a card. made: the day. ranges: for each scheme of `MEASURED`."""

    made: str
    ranges: Mapping[str, Ranges]


@cache
def card(device: torch.device) -> Card:
    """The card of a device."""
    texts = "".join(in_cuda.source(name) for name in ("few", "many", "hopper"))
    texts += "".join(Path(path).read_text(encoding="utf-8") for path in (__file__, in_cuda.__file__))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    digest = sha256(texts.encode()).hexdigest()[:16]
    return Card(torch.cuda.get_device_name(device), capability, in_cuda.driver_version(), torch.__version__, digest)


@cache
def tuned(device: torch.device) -> Tuned | str | None:
    """What was measured on the card of a device: a sentence if its file cannot be used, None if there is no file."""
    try:
        path = existing(card(device).entry)
    except (OSError, FewbitError):  # there is no cache; a product does not need one
        return None
    return None if path is None else read(path, card(device))


def read(path: Path, card: Card) -> Tuned | str:
    """What the file of a card holds, or a sentence that says why it is not used."""
    try:
        held = read_json(path)
        there, expected = dict(held["card"]), asdict(card)
        if changed := [name for name, value in expected.items() if there.get(name) != value]:
            return f"{path} is not used: it was measured with another {' and '.join(changed)}"
        ranges = {scheme: _ranges(held["ranges"][scheme], card) for scheme in MEASURED}
        return Tuned(date.fromisoformat(held["made"]).isoformat(), ranges)
    except OSError as error:
        return f"{path} is not used: it cannot be read ({error.strerror or error})"
    except (FewbitError, KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{path}: ")[:100]
        return f"{path} is not used: it is damaged ({reason or type(error).__name__})"


def _ranges(value: Any, card: Card) -> Ranges:
    """The ranges in a file. ValueError or TypeError if they are not such that `doctor --tune` writes them."""
    found = tuple((rows, tuple(_sizes(each) for each in several)) for rows, several in value)
    if tuple(rows for rows, _ in found) != ENDS:
        raise ValueError("other numbers of rows")
    for rows, several in found:
        allowed = candidates(rows, card.capability == "9.0")
        if len(several) > MOST or not set(several) <= set(allowed) or not (several or dequantizes(rows)):
            raise ValueError(f"unknown sizes for {rows} rows")
    return found


def _sizes(value: Any) -> Sizes:
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        raise ValueError("sizes that are not integers")
    return Sizes(*value)


def write(card: Card, ranges: Mapping[str, Ranges]) -> Path:
    """Keep what was measured on a card, in place of what was measured before."""
    path = cache_folder() / card.entry
    path.parent.mkdir(exist_ok=True)
    made = datetime.now(UTC).date().isoformat()
    replace_text(path, json.dumps({"card": asdict(card), "made": made, "ranges": ranges}) + "\n")
    label(path, card.name, "the fastest sizes of GPU kernels on this card")
    tuned.cache_clear()
    return path
