"""Importance matrix files, as llama.cpp's tools write and read them: mean x_j² of the input of each weight.

The newer format is a GGUF file. For a weight with K columns called `blk.0.attn_q.weight` it holds

    blk.0.attn_q.weight.in_sum2   float32 [K]      sum of x_j² over all tokens
    blk.0.attn_q.weight.counts    float32 [1]      number of tokens

and, for mixture-of-experts weights, one row of both for each expert. Its keys hold the names of the texts and the
number of chunks that they were split into. The older format, `.dat`, is little-endian and has no header:

    number of entries i32
    for each entry: length of the name i32, name, number of chunks i32, number of values i32,
                    values float32: mean x_j² times the number of chunks
    optional: total number of chunks i32, length of the text's name i32, name of the text

Source: tools/imatrix and imatrix-loader.cpp of llama.cpp as in llama-cpp-python 0.3.36.

Every count and length is checked against the size of the file before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import MAGIC, Entry, GgufFile, GgufWriter
from fewbit.lazy import Tensor, torch

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 4096
_HINT = "The file is damaged, or is not an importance matrix. Make it again: fewbit imatrix MODEL -o FILE."


class Importance(NamedTuple):
    """Mean x_j² [K] over `rows` tokens. The older format stores only the number of chunks, so `rows` is that.

    For the E experts of a layer: [E · K] when it is read, with the largest number of tokens; to be written, [E, K] and
    the number of tokens of each expert.
    """

    mean_square: Tensor
    rows: int | tuple[int, ...]

    @property
    def most(self) -> int:
        """The number of tokens, or the largest of the experts'."""
        return self.rows if isinstance(self.rows, int) else max(self.rows)


def read(path: Path) -> dict[str, Importance]:
    """Name of a weight -> its importance. FormatError, with the name of the weight, if the values are invalid."""
    try:
        with open(path, "rb") as file:
            newer = file.read(4) == MAGIC
    except OSError as error:
        raise PlanError(f"importance matrix {path}: {error.strerror}") from None
    importances = _read_gguf(path) if newer else _read_dat(path)
    for name, (mean_square, _) in importances.items():
        if not torch.isfinite(mean_square).all() or bool((mean_square < 0).any()):
            raise FormatError(f"{path}: the importances of {name} are negative or not finite", _HINT)
    if not importances:
        raise FormatError(f"{path} holds no importances", _HINT)
    return importances


def check(out: str | Path) -> None:
    """PlanError unless `out` has a suffix of importance matrices."""
    if Path(out).suffix not in (".gguf", ".dat"):
        raise PlanError(f"{out}: an importance matrix must be a .gguf or .dat file", "Give another `out`.")


def write(path: Path, matrix: Mapping[str, Importance], *, chunks: int, length: int, text: str) -> None:
    """Write `matrix`, measured over `chunks` chunks of `length` tokens of `text`.

    The format is GGUF, or the older one if `path` ends in .dat.
    """
    if path.suffix == ".dat":
        path.write_bytes(_dat(matrix, chunks, length, text))
        return
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": [text],
        "imatrix.chunk_count": chunks,
        "imatrix.chunk_size": length,
    }
    entries, tensors = [], []
    for name in sorted(matrix):
        mean_square, rows = matrix[name]
        each = (rows,) if isinstance(rows, int) else rows
        counts = torch.tensor(each, dtype=torch.float32, device="cpu").reshape(*mean_square.shape[:-1], 1)
        entries += [
            Entry(name + _SUMS, "f32", tuple(mean_square.shape)),
            Entry(name + _COUNTS, "f32", tuple(counts.shape)),
        ]
        tensors += [mean_square.float() * counts, counts]
    with GgufWriter(path, keys, entries) as writer:
        for entry, tensor in zip(entries, tensors, strict=True):
            writer.add(entry.name, tensor)


def _read_gguf(path: Path) -> dict[str, Importance]:
    file = GgufFile(path)
    kind = file.metadata.get("general.type", "imatrix")
    if not isinstance(kind, str) or kind != "imatrix":
        raise FormatError(f"{path} is a GGUF file, but not an importance matrix", _HINT)
    importances = {}
    for name, entry in file.entries.items():
        weight = name.removesuffix(_SUMS).removesuffix(_COUNTS)
        if weight == name:
            continue
        other = weight + (_COUNTS if name.endswith(_SUMS) else _SUMS)
        if other not in file.entries:
            raise FormatError(f"{path}: it has {name}, but not {other}", _HINT)
        if entry.type != "f32":
            raise FormatError(f"{path}: {name} has type {entry.type}, expected f32", _HINT)
        if name.endswith(_SUMS) and file.entries[other].type == "f32":
            sums, counts = file.get(name).reshape(-1), file.get(other).reshape(-1)
            if len(sums) % len(counts):
                raise FormatError(f"{path}: {name} has {len(sums)} values for {len(counts)} counts", _HINT)
            if not torch.isfinite(counts).all() or bool((counts < 0).any()):
                raise FormatError(f"{path}: {other} is not a valid number of tokens", _HINT)
            sums, counts = sums.reshape(len(counts), -1), counts[:, None]
            # An expert that no token reached gets equal importances, as in llama.cpp.
            means = torch.where(counts > 0, sums / counts.clamp(min=1), torch.ones_like(sums))
            importances[weight] = Importance(means.flatten(), max(1, int(counts.max())))
    return importances


class _Bytes:
    """A reader of a file in the older format. `at`: the position of the next byte."""

    def __init__(self, path: Path) -> None:
        self.path, self.raw, self.at = path, path.read_bytes(), 0

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > len(self.raw) - self.at:
            raise FormatError(f"{self.path} ends in {what} (at byte {self.at} of {len(self.raw)})", _HINT)
        self.at += nbytes
        return self.raw[self.at - nbytes : self.at]

    def number(self, what: str, lowest: int, highest: int) -> int:
        number = int.from_bytes(self.take(4, what), "little", signed=True)
        if not lowest <= number <= highest:
            raise FormatError(f"{self.path}: {what} is {number}", _HINT)
        return number

    def text(self, what: str) -> str:
        raw = self.take(self.number(f"the length of {what}", 0, _LONGEST_NAME), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: {what} is not valid UTF-8", _HINT) from None

    @property
    def left(self) -> int:
        return len(self.raw) - self.at


def _read_dat(path: Path) -> dict[str, Importance]:
    file, matrix = _Bytes(path), {}
    entries = file.number("the number of entries", 1, 1 << 20)
    for entry in range(entries):
        name = file.text(f"the name of entry {entry}")
        chunks = file.number(f"the number of chunks of {name}", 0, (1 << 31) - 1)
        count = file.number(f"the number of values of {name}", 1, max(1, file.left // 4))
        values = torch.frombuffer(bytearray(file.take(4 * count, name)), dtype=torch.float32)
        if name in matrix:
            raise FormatError(f"{path}: it has {name} twice", _HINT)
        matrix[name] = Importance(values / chunks if chunks else values, max(1, chunks))
    if file.left:
        file.number("the total number of chunks", 0, (1 << 31) - 1)
        file.text("the name of the text")
        if file.left:
            raise FormatError(f"{path}: {file.left} extra bytes after the last value", _HINT)
    return matrix


def _dat(matrix: Mapping[str, Importance], chunks: int, length: int, text: str) -> bytes:
    out = [struct.pack("<i", len(matrix))]
    for name in sorted(matrix):
        mean_square, rows = matrix[name].mean_square.flatten(), matrix[name].most
        calls = -(-rows // length)
        values = (mean_square.float() * calls).cpu().numpy().astype("<f4").tobytes()
        out.append(_text(name) + struct.pack("<ii", calls, len(mean_square)) + values)
    return b"".join([*out, struct.pack("<i", chunks), _text(text)])


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<i", len(raw)) + raw
