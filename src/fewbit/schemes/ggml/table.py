"""The table of ggml's block types: number in a GGUF file, columns of a block, bytes of a block."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class BlockType(NamedTuple):
    """number: its id in a GGUF file's tensor table. A block stores `columns` columns of a row in `nbytes` bytes."""

    number: int
    columns: int
    nbytes: int


BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "q4_0": BlockType(2, 32, 18),
        "q4_1": BlockType(3, 32, 20),
        "q5_0": BlockType(6, 32, 22),
        "q5_1": BlockType(7, 32, 24),
        "q8_0": BlockType(8, 32, 34),
        "q2_k": BlockType(10, 256, 84),
        "q3_k": BlockType(11, 256, 110),
        "q4_k": BlockType(12, 256, 144),
        "q5_k": BlockType(13, 256, 176),
        "q6_k": BlockType(14, 256, 210),
        "iq2_xxs": BlockType(16, 256, 66),
        "iq2_xs": BlockType(17, 256, 74),
        "iq3_xxs": BlockType(18, 256, 98),
        "iq1_s": BlockType(19, 256, 50),
        "iq4_nl": BlockType(20, 32, 18),
        "iq3_s": BlockType(21, 256, 110),
        "iq2_s": BlockType(22, 256, 82),
        "iq4_xs": BlockType(23, 256, 136),
        "iq1_m": BlockType(29, 256, 56),
        "tq1_0": BlockType(34, 256, 54),
        "tq2_0": BlockType(35, 256, 66),
        "mxfp4": BlockType(39, 32, 17),
        "q1_0": BlockType(41, 128, 18),
        "q2_0": BlockType(42, 64, 18),
    }
)
