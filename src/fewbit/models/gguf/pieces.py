"""Tensors of a model that a GGUF file holds in pieces.

Some models have in one matrix what llama.cpp computes with two. The rows of such a matrix [N, K] are those of the first
head, then those of the second. The rows of a head have parts, such as its keys and its values. A piece has some of
these parts, of all heads:

    model                                 file
    Qwen3-Next's in_proj_qkvz             attn_qkv: queries of all heads, then keys, then values; attn_gate

A piece may also be transposed, head by head, as llama.cpp stores the keys of latent attention: [heads, K, rows]. It has
no blocks of the matrix's rows, so a plan leaves such a matrix in 16 bits.

The gate and up matrices of an expert may be one tensor, [experts, 2 N, K], whose rows are those of gate, then of up.
The model then has 2 experts matrices [N, K], and no matrix of the file is cut.

A `Route` has the whole matrix under one name: the one that llama.cpp gave it while it was still whole, such as
ssm_in. `Joined` shows a file as if it were so. So readers know nothing of pieces, and files from that time are read
too. A writer cuts the finished matrix.

>>> split = Split(2, (Share("k", (1,), True, True), Share("v", (2,), True, False)))
>>> whole = torch.arange(6.0).view(6, 1)  # k, v, v of the first head, then of the second
>>> [piece.flatten().tolist() for piece in split.cut(whole)]
[[0.0, 3.0], [1.0, 2.0, 4.0, 5.0]]
>>> torch.equal(split.joined(split.cut(whole)), whole)
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.formats.containers.gguf import PLAIN, Entry, GgufFile
from fewbit.schemes.base import QTensor
from fewbit.schemes.ggml import codec

_FOUR = 4  # dimensions


@dataclass(frozen=True)
class Share:
    """One piece. sizes: the rows of each of its parts in a head. by_head: it is [heads, rows, K] in the file, and not
    [heads * rows, K]; it then has one part. transposed: it is [heads, K, rows]. convolution: it is
    [heads * rows, 1, K]."""

    name: str
    sizes: tuple[int, ...]
    by_head: bool
    transposed: bool
    convolution: bool = False


@dataclass(frozen=True)
class Split:
    """How a matrix of so many heads is cut. The parts of a head are those of the first piece, then of the second."""

    heads: int
    shares: tuple[Share, ...]
    matrices: int = 0  # of the model, which are [matrices, N, K]; 0: it is one matrix [N, K]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the pieces in the file."""
        return tuple(share.name for share in self.shares)

    @property
    def by_rows(self) -> bool:
        """Whether each row of the matrix is a row of a piece, so that blocks stay as they are."""
        return not any(share.transposed for share in self.shares)

    def shapes(self, columns: int) -> list[tuple[int, ...]]:
        """The shapes of the pieces of a matrix with so many columns."""
        found: list[tuple[int, ...]] = []
        for share in self.shares:
            rows = sum(share.sizes)
            each = (columns, rows) if share.transposed else (rows, columns)
            whole = (self.heads * rows, *((1,) if share.convolution else ()), columns)
            found.append((self.heads, *each) if share.by_head else whole)
        return found

    def entries(self, whole: Entry) -> list[Entry]:
        """The pieces of a matrix, of its type."""
        return [
            Entry(name, whole.type, shape) for name, shape in zip(self.names, self.shapes(whole.shape[-1]), strict=True)
        ]

    def cut(self, whole: Tensor) -> list[Tensor]:
        """The pieces of a matrix [N, K], or of the blocks of its rows."""
        found, whole = [], whole.flatten(0, -2)
        for share, rows in zip(self.shares, self._rows(), strict=True):
            piece = whole[rows]
            piece = piece.view(self.heads, -1, piece.shape[-1]) if share.by_head else piece
            piece = piece.unsqueeze(1) if share.convolution else piece
            found.append(piece.transpose(1, 2).contiguous() if share.transposed else piece)
        return found

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The matrix [N, K] of these pieces, or its blocks."""
        rows = []
        for share, piece in zip(self.shares, pieces, strict=True):
            piece = piece.transpose(1, 2) if share.transposed else piece
            rows.append(piece.flatten(0, 1) if share.by_head or share.convolution else piece)
        whole = torch.cat(rows)[torch.cat(self._rows()).argsort()]
        return whole.view(self.matrices, -1, whole.shape[-1]) if self.matrices else whole

    def _rows(self) -> list[Tensor]:
        """The rows of the matrix that each piece has, in its order, int64."""
        sizes = [size for share in self.shares for size in share.sizes]
        places = torch.arange(self.heads * sum(sizes), dtype=torch.int64, device="cpu").view(self.heads, -1)
        parts = iter(places.split(sizes, dim=1))
        return [torch.cat([next(parts).flatten() for _ in share.sizes]) for share in self.shares]


@dataclass(frozen=True)
class Listed:
    """A number of a model that a file has in the list of a key. shape: what it has in the model, () or (1,)."""

    key: str
    place: int
    shape: tuple[int, ...]


class Joined:
    """A GGUF file that shows each matrix it holds in pieces as one tensor. Otherwise it is `stored`, the file.

    It shows numbers in lists of keys as tensors, too, and no dimensions of 1 before the others of a tensor with four:
    llama.cpp's converter writes these, and its quantizer does not.

    If the pieces of a matrix are of different types, or have other rows, they cannot be joined as blocks: the tensor
    then has floats of the type `plain`. FormatError if a piece is missing, or has a wrong shape.
    """

    def __init__(
        self, stored: GgufFile, splits: Mapping[str, Split], listed: Mapping[str, Listed], plain: str = "f32"
    ) -> None:
        self.stored, self.plain, self.listed = stored, plain, listed
        self.shown = {name: entry._replace(shape=_shortened(entry.shape)) for name, entry in stored.entries.items()}
        self.splits = {name: split for name, split in splits.items() if stored.entries.keys() & split.names}
        first = {split.names[0]: name for name, split in self.splits.items()}
        pieces = {piece for split in self.splits.values() for piece in split.names}
        self.entries: dict[str, Entry] = {}
        for entry in self.shown.values():
            if entry.name in first:
                self.entries[first[entry.name]] = self._joined(first[entry.name])
            elif entry.name not in pieces:
                self.entries[entry.name] = entry
        self.entries |= {name: Entry(name, "f32", each.shape) for name, each in listed.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def files(self) -> tuple[Path, ...]:
        return self.stored.files

    @property
    def metadata(self) -> dict[str, Any]:
        return self.stored.metadata

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def pieces(self, name: str) -> list[Entry]:
        """The tensors of the file that make up this one; none of a number in a list."""
        if name in self.listed:
            return []
        return [self.shown[each] for each in (self.splits[name].names if name in self.splits else (name,))]

    def get(self, name: str) -> Tensor:
        """The tensor, as its entry says."""
        if name in self.listed:
            return self._number(self.listed[name])
        stored = [self._shown(entry) for entry in self.pieces(name)]
        if name not in self.splits:
            return stored[0]
        if self._as_they_are(name):
            return self.splits[name].joined(stored)
        dtype = self.entries[name].spec.dtype
        return self.splits[name].joined(
            [decoded(entry, tensor, dtype) for entry, tensor in zip(self.pieces(name), stored, strict=True)]
        )

    def release(self, name: str) -> None:
        """Free the memory of the pages of a tensor, after it was copied."""
        for entry in self.pieces(name):
            self.stored.release(entry.name)

    def cut(self, name: str, whole: Tensor) -> list[Tensor]:
        """The tensors of the file, as `pieces` lists them, of a new value of this one."""
        pieces = [whole]
        if name in self.splits and not self._as_they_are(name):
            pieces = [self.stored.get(entry.name) for entry in self.pieces(name)]
        elif name in self.splits:
            pieces = self.splits[name].cut(whole)
        stored = [self.stored.entries[entry.name] for entry in self.pieces(name)]
        return [piece.reshape(entry.spec.shape) for entry, piece in zip(stored, pieces, strict=True)]

    def _shown(self, entry: Entry) -> Tensor:
        """A tensor of the file, in the shape that is shown."""
        found = self.stored.get(entry.name)
        return found if found.dim() < _FOUR else found.view(entry.shape)

    def _number(self, listed: Listed) -> Tensor:
        found = self.metadata.get(listed.key)
        if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or listed.place >= len(found):
            raise FormatError(f"{self.path}: {listed.key} has no number of layer {listed.place}")
        return torch.tensor(found[listed.place].item(), dtype=torch.float32, device="cpu").view(listed.shape)

    def _as_they_are(self, name: str) -> bool:
        kinds = {entry.type for entry in self.pieces(name)}
        return len(kinds) == 1 and (kinds <= PLAIN.keys() or self.splits[name].by_rows)

    def _joined(self, name: str) -> Entry:
        split, found = self.splits[name], self.shown
        if missing := [piece for piece in split.names if piece not in found]:
            raise FormatError(f"{self.path}: it has {split.names[0]}, but not {missing[0]}")
        columns = found[split.names[0]].shape[1 if split.shares[0].transposed else -1]
        for piece, shape in zip(split.names, split.shapes(columns), strict=True):
            if found[piece].shape != shape:
                raise FormatError(
                    f"{self.path}: {piece} has shape {list(found[piece].shape)}, the model expects {list(shape)}"
                )
        rows = split.heads * sum(sum(share.sizes) for share in split.shares)
        shape = (split.matrices, rows // split.matrices, columns) if split.matrices else (rows, columns)
        kind = found[split.names[0]].type if self._as_they_are(name) else self.plain
        return Entry(name, kind, shape)


def _shortened(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of four dimensions without those of 1 before the others."""
    if len(shape) < _FOUR:
        return shape
    first = next((place for place, size in enumerate(shape) if size != 1), len(shape) - 1)
    return shape[first:]


def decoded(entry: Entry, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a file, quantized or not, as floats."""
    if entry.type in PLAIN:
        return stored.to(dtype)
    rows = stored.reshape(-1, stored.shape[-1])
    weight = QTensor(codec(entry.type), (rows.shape[0], entry.shape[-1]), {})
    weight.parts[weight.codec.payload] = rows
    return weight.dequantize(dtype).view(entry.shape)
