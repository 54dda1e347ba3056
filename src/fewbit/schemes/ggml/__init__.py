"""The block types of ggml, byte for byte as in GGUF files: blocks of codes whose scales are quantized too.

A row is cut into blocks of 32 or 256 columns. A block of 32 has one fp16 scale; some types add an fp16 minimum. A
block of 256 (the *k-quants* and iq4_xs) has sub-blocks of 16 or 32 columns. Their scales sc and minima m are integers
of 4 to 8 bits, in units of d and dmin, the fp16 scale and minimum of the block. Code c in sub-block g means

    w = (d sc_g) level[c] - dmin m_g,      level[c] = c - zero, or one of sixteen unevenly spaced levels (iq4).

`fit` searches d, dmin, sc and m together, all rounded as stored (see `search`). Codes are then rounded to nearest, ties
to even. A type without minimum has one level more on one side; the sign of its scale gives that level to either tail.

The types with a codebook (iq2, iq3) store vectors of 8 or 4 columns: see `iq`. Those with two to four levels have one
scale for a block: see `few`.

`nearest` searches with equal weights for all columns. llama.cpp without an importance matrix weighs by w² + mean w²;
that raises the KL divergence of the embedded model by 9 to 16 %. `refit` re-solves sc and m, then d and dmin, under a
Hessian for codes that are already chosen.

Layout: one part, `blocks` uint8 [N, K / columns * bytes]. The module `layout` describes the bytes of a block for types
of one rule (`GGML`, a scheme), `digits` for those with two to four levels (`Few`, a scheme), and `codebook` for those
with a codebook (`IQ`, a scheme) and those that can only be read (`ReadOnly`). Source: ggml of llama.cpp,
https://github.com/ggml-org/llama.cpp.

>>> import torch
>>> w = torch.arange(-8.0, 8.0).repeat(2)[None] / 4
>>> scheme = codec("q4_0")                                   # levels -8 ... 7 times d
>>> codes, grids = scheme.nearest(w)
>>> scheme.pack(codes, grids)["blocks"][0, :2].view(torch.float16).tolist(), codes[0, :4].tolist()
([0.25], [0, 1, 2, 3])
"""

from __future__ import annotations

from fewbit.schemes.base import Codec
from fewbit.schemes.ggml.codec import ReadOnly
from fewbit.schemes.ggml.few import Few
from fewbit.schemes.ggml.iq import IQ
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.ggml.table import BLOCK_TYPES, BlockType

__all__ = ["BLOCK_TYPES", "GGML", "IQ", "BlockType", "Few", "codec"]


def codec(name: str) -> Codec:
    """The codec of a block type by its lower-case name: a Scheme if the type can be written. KeyError if unknown."""
    columns = BLOCK_TYPES[name].columns
    for kind in (IQ, Few):
        if name in kind.examples:
            return kind(columns, name)
    return GGML(columns, name) if name in GGML.examples else ReadOnly(name)
