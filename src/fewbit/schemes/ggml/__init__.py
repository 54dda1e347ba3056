"""The block types of ggml, which GGUF files hold."""

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
