"""The block types of ggml, byte for byte as GGUF files hold them: weights in blocks with scales that are few bits too.

A row is cut into blocks of 32 or 256 columns. A block of 32 has one fp16 scale, and some types an fp16 minimum; a
block of 256 (the *k-quants* and iq4_xs) has sub-blocks of 16 or 32 columns whose scales and minima are whole numbers of
4 to 8 bits, counted in units d and dmin of the block. With code c in sub-block g,

    w = (d sc_g) level[c] - dmin m_g,      level[c] = c - zero, or one of sixteen uneven ones (iq4).

What a file stores in few bits is so when codes are chosen: `fit` searches d, dmin, sc and m together (see `search`),
and codes are rounded to nearest, ties to even. Of a type without minimum, either tail may get the one level more, by
the sign of the scale. `nearest` searches with all columns weighed alike: by w² + mean w², which llama.cpp uses where it
has no importance matrix, the KL divergence of the embedded model is 9 to 16 % higher. `refit` re-solves sc and m, then
d and dmin, for codes that are chosen, under a Hessian.

Layout: one part, `blocks`, uint8 [N, K / columns * bytes]; within a block as `layout` says for types that can be
written (`GGML`, a scheme) and `codebook` for those that are only read (`ReadOnly`). Source: ggml of llama.cpp,
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
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.ggml.table import BLOCK_TYPES, BlockType

__all__ = ["BLOCK_TYPES", "GGML", "BlockType", "codec"]


def codec(name: str) -> Codec:
    """The codec of a block type by its lower-case name; a Scheme where it can be written. KeyError for another name."""
    columns = BLOCK_TYPES[name].columns
    return GGML(columns, name) if name in GGML.examples else ReadOnly(name)
