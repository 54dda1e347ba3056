"""Reads and writes GGUF, the single-file format of llama.cpp. The reader checks bounds; the writer needs one pass.

All numbers are little-endian. A string is a 64-bit length and UTF-8 bytes without a terminator. An array is the type of
its elements, a 64-bit length and the elements.

    "GGUF"     version u32 (2 or 3), number of tensors u64, number of keys u64
    key        string, type u32, value                                                     repeated for each key
    tensor     string, number of dimensions u32, dimensions u64 (columns first),           repeated for each tensor
               type u32, offset u64
    padding    to a multiple of `general.alignment` (default: 32)
    data       the tensors; each offset counts from the start of the data and is a multiple of the alignment

A tensor of a block type (schemes/ggml) holds the blocks of each row, row after row. As uint8 [N, bytes of a row] these
bytes are the scheme's part without conversion, so reading is a memory-mapped view.

A model may be split over several files (gguf_parts.py). Source: docs/gguf.md of ggml (https://github.com/ggml-org/ggml).

Every length is compared with the size of the file before it is used, so a file with a false length cannot make the
reader allocate more memory than a valid file of that size.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import gguf_parts
from fewbit.formats.containers.gguf_strings import DAMAGED, Strings
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec
from fewbit.schemes.ggml.table import BLOCK_TYPES

MAGIC, VERSIONS, VERSION, ALIGNMENT = b"GGUF", (2, 3), 3, 32
_LONGEST_KEY, _LONGEST_NAME = 65535, 63  # ggml stores tensor names in 64 bytes with a 0 at the end
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 1 << 16, 1 << 17, 1 << 22

# Types of metadata values.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_KIND_OF = {np.dtype(dtype): kind for kind, dtype in _NUMBERS.items()} | {np.dtype(bool): _BOOL}

SAVED = "model.gguf"  # the name of the file that `save_pretrained` writes
# Types of unquantized tensors: the type's number in a file, and torch's name.
PLAIN = {
    "f32": (0, "float32"),
    "f16": (1, "float16"),
    "bf16": (30, "bfloat16"),
    "f64": (28, "float64"),
    "i8": (24, "int8"),
    "i16": (25, "int16"),
    "i32": (26, "int32"),
    "i64": (27, "int64"),
}
_NUMBER_OF = {name: number for name, (number, _) in PLAIN.items()} | {n: b.number for n, b in BLOCK_TYPES.items()}
_TYPE_OF = {number: name for name, number in _NUMBER_OF.items()}


class Entry(NamedTuple):
    """A tensor: its name in the file, its type (`f32`, `q4_k`) and its shape, rows first as in PyTorch."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def spec(self) -> PartSpec:
        """Shape and dtype in memory. For a block type: uint8, with the bytes of a row as columns."""
        if self.type in PLAIN:
            return PartSpec(self.shape, getattr(torch, PLAIN[self.type][1]))
        block = BLOCK_TYPES[self.type]
        return PartSpec((*self.shape[:-1], self.shape[-1] // block.columns * block.nbytes), torch.uint8)

    def why_not(self) -> str | None:
        """None if a GGUF file can hold the tensor, else a sentence that says why not."""
        if not 0 < len(self.name.encode()) <= _LONGEST_NAME:
            return f"the name {self.name[:80]!r} must have 1 to {_LONGEST_NAME} bytes"
        if self.type not in _NUMBER_OF:
            return f"{self.name}: there is no type {self.type!r}"
        if not 1 <= len(self.shape) <= 4 or min(self.shape) < 1:
            return f"{self.name} has shape {list(self.shape)}; expected one to four dimensions above 0"
        if self.type in BLOCK_TYPES and self.shape[-1] % BLOCK_TYPES[self.type].columns:
            columns = BLOCK_TYPES[self.type].columns
            return f"{self.name} has {self.shape[-1]} columns, not a multiple of {columns} ({self.type} blocks)"
        return None


class GgufFile:
    """A GGUF file, or all files of a split model, given any of them. Only headers are read; data is memory-mapped.

    `metadata`: key -> number, str, bool, `Strings`, or numpy array of numbers. `entries`: name -> Entry, in the
    order of the file. FormatError, with the position, if the file is invalid.
    """

    def __init__(self, path: str | Path) -> None:
        first = _Part(Path(path))
        if first.number("split.no", 0) > 0:
            first = _Part(gguf_parts.first_of(first.path))
        self.path, self.metadata, parts = first.path, first.metadata, [first]
        if (count := first.number("split.count", 1)) > 1:
            parts += [_Part(file) for file in gguf_parts.others(first.path, count)]
        self.files, self._parts = tuple(part.path for part in parts), parts
        self.entries: dict[str, Entry] = {}
        self._place: dict[str, tuple[_Part, int]] = {}
        for number, part in enumerate(parts):
            if count > 1 and part.number("split.no", 0 if part is first else -1) != number:
                raise FormatError(f"{part.path}: split.no must be {number}, according to the file's name")
            for entry, offset in part.tensors:
                if entry.name in self.entries:
                    raise FormatError(f"{part.path}: it has the tensor {entry.name} twice")
                self.entries[entry.name], self._place[entry.name] = entry, (part, offset)
        if count > 1 and first.number("split.tensors.count", len(self.entries)) != len(self.entries):
            raise FormatError(f"{first.path}: its files have {len(self.entries)} tensors, split.tensors.count differs")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.spec.nbytes for entry in self.entries.values())

    def get(self, name: str) -> Tensor:
        """The tensor, with the shape and dtype of `Entry.spec`. It is memory-mapped; writes do not change the file."""
        (part, offset), spec = self._place[name], self.entries[name].spec
        if offset % spec.dtype.itemsize:
            raw = bytearray(part.pages[offset : offset + spec.nbytes])
            return torch.frombuffer(raw, dtype=spec.dtype).view(spec.shape)
        count = prod(spec.shape)
        return torch.frombuffer(part.pages, dtype=spec.dtype, count=count, offset=offset).view(spec.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def release(self, name: str) -> None:
        """Free the memory of a tensor's pages, after it was copied. The next access reads them again."""
        part, offset = self._place[name]
        part.release(offset, offset + self.entries[name].spec.nbytes)

    def release_headers(self) -> None:
        """Free the memory of the pages of all metadata: a vocabulary takes as much as the weights of some layers."""
        for part in self._parts:
            part.release(0, part.at)


def is_gguf(path: Path) -> bool:
    """Whether a file's suffix or first bytes are those of GGUF."""
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


class _Part:
    """One file: its metadata, and its tensors with their offsets from the start of the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                # Copy on write: a write to a weight must neither crash the process nor change the file.
                self.pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError):
                raise FormatError(f"{path}: it is empty", DAMAGED) from None
            raise FormatError(f"{path}: {error}") from None
        self.metadata: dict[str, Any] = {}
        tensors, keys = self._preamble()
        for number in range(keys):
            key = self._string(f"the name of key {number}", _LONGEST_KEY)
            if key in self.metadata:
                raise self.wrong(f"it has the key {key} twice")
            self.metadata[key] = self._value(key, self._u32(key))
        self.alignment = self.number("general.alignment", ALIGNMENT)
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise self.wrong(f"general.alignment is {self.alignment}, not a power of two")
        infos = [self._info(number) for number in range(tensors)]
        self.tensors = self._placed(infos)

    def release(self, start: int, end: int) -> None:
        """Free the memory of the whole pages between two offsets."""
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED, start, length)

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}", DAMAGED)

    def number(self, key: str, default: int) -> int:
        """An integer of the metadata."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(f"{key} is {_shown(value)}, not an integer")
        return value

    def _preamble(self) -> tuple[int, int]:
        if self.pages[:4] != MAGIC:
            raise self.wrong("it does not begin with GGUF")
        self.at = 4
        version = self._u32("the version")
        if not version & 0xFFFF:
            raise FormatError(f"{self.path} is big-endian", "fewbit reads only little-endian files. Convert it first.")
        if version not in VERSIONS:
            hint = "Convert it again with a llama.cpp of late 2023 or newer." if version == 1 else "Update fewbit."
            raise FormatError(f"{self.path} has version {version} of GGUF; fewbit reads 2 and 3", hint)
        tensors, keys = self._u64("the number of tensors"), self._u64("the number of keys")
        left = self.size - self.at
        # The minimum: 33 bytes for a tensor with a name of one byte and one dimension, 14 for a key of one byte.
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS or 33 * tensors + 14 * keys > left:
            raise self.wrong(f"{tensors} tensors and {keys} keys do not fit into {self.size} bytes")
        return tensors, keys

    def _take(self, nbytes: int, what: str) -> int:
        """Advance by `nbytes`, and return the position before that."""
        at = self.at
        if nbytes > self.size - at:
            raise self.wrong(f"it ends in {what} ({nbytes} bytes at byte {at} of a file of {self.size})")
        self.at = at + nbytes
        return at

    def _u32(self, what: str) -> int:
        return int.from_bytes(self.pages[(at := self._take(4, what)) : at + 4], "little")

    def _u64(self, what: str) -> int:
        return int.from_bytes(self.pages[(at := self._take(8, what)) : at + 8], "little")

    def _string(self, what: str, longest: int | None = None) -> str:
        length = self._u64(what)
        if longest is not None and length > longest:
            raise self.wrong(f"{what} has {length} bytes")
        at = self._take(length, what)
        try:
            return self.pages[at : at + length].decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not valid UTF-8") from None

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind == _BOOL:
            byte = self.pages[self._take(1, key)]
            if byte > 1:
                raise self.wrong(f"{key} is {byte}, neither true nor false")
            return bool(byte)
        if kind not in _NUMBERS:
            raise self.wrong(f"{key} has a value of unknown type {kind}")
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str) -> Any:
        kind, length = self._u32(key), self._u64(key)
        if kind == _ARRAY:
            raise self.wrong(f"{key} is an array of arrays")
        if kind == _STRING:
            if length > min(_MOST_STRINGS, (self.size - self.at) // 8):
                raise self.wrong(f"{key} has {length} strings, more than the file has room for")
            return self._strings(key, length)
        if kind == _BOOL:
            at = self._take(length, key)
            values = np.frombuffer(self.pages, np.uint8, length, at)
            if length and values.max() > 1:
                raise self.wrong(f"{key} has values that are neither true nor false")
            return values.astype(bool)
        if kind not in _NUMBERS:
            raise self.wrong(f"{key} is an array of unknown type {kind}")
        return self._numbers(key, kind, length)

    def _numbers(self, key: str, kind: int, length: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.pages, dtype, length, self._take(length * dtype.itemsize, key))

    def _strings(self, key: str, length: int) -> Strings:
        found = Strings(self.pages, self.at, length, f"{self.path}: {key}")
        self.at = found.end
        if not key.startswith("tokenizer."):  # vocabularies take long, and are decoded when they are used
            for _ in found:  # refuses what is not valid UTF-8
                pass
        return found

    def _info(self, number: int) -> tuple[Entry, int]:
        what = f"tensor {number}"
        name = self._string(f"the name of {what}", _LONGEST_KEY)
        what = name or what
        dimensions = self._u32(what)
        if dimensions > 4:
            raise self.wrong(f"{what} has {dimensions} dimensions")
        shape = tuple(self._u64(what) for _ in range(dimensions))[::-1]
        kind, offset = self._u32(what), self._u64(what)
        if kind not in _TYPE_OF:
            raise FormatError(f"{self.path}: {what} has unknown type {kind}", "Update fewbit.")
        entry = Entry(name, _TYPE_OF[kind], shape)
        if reason := entry.why_not():
            raise self.wrong(reason)
        if entry.spec.nbytes > self.size:
            raise self.wrong(f"{name} has shape {list(shape)}: {entry.spec.nbytes} bytes in a file of {self.size}")
        return entry, offset

    def _placed(self, infos: list[tuple[Entry, int]]) -> list[tuple[Entry, int]]:
        """The tensors with their offsets in the file. An error if one is beyond the file's end, or if two overlap."""
        base = _aligned(self.at, self.alignment)
        placed = []
        for entry, offset in infos:
            if offset % self.alignment:
                raise self.wrong(f"{entry.name} is at offset {offset}, not a multiple of {self.alignment}")
            if base + offset + entry.spec.nbytes > self.size:
                end = base + offset + entry.spec.nbytes
                raise self.wrong(f"{entry.name} would end at byte {end} of a file of {self.size}")
            placed.append((entry, base + offset))
        end, before = 0, ""
        for entry, start in sorted(placed, key=lambda each: each[1]):
            if start < end:
                raise self.wrong(f"{entry.name} and {before} overlap")
            end, before = start + entry.spec.nbytes, entry.name
        return placed


class GgufWriter:
    """Writes a GGUF file, one tensor at a time in any order. The file appears at `path` only when it is complete.

        with GgufWriter(path, metadata, entries) as writer:
            for entry in entries:
                writer.add(entry.name, tensor)          # as entry.spec says

    Metadata values: str, bool, int (u32 if it fits), float (f32), numpy scalars and arrays (in their own type), and
    lists of one of these (ints as i32). PlanError, before anything is written, for a tensor that GGUF cannot hold.
    """

    def __init__(
        self,
        path: str | Path,
        metadata: Mapping[str, Any],
        entries: Sequence[Entry],
        *,
        alignment: int = ALIGNMENT,
        overwrite: bool = False,
    ) -> None:
        self.path, self.overwrite = Path(path), overwrite
        if self.path.exists() and not overwrite:
            raise PlanError(f"{path} exists")
        header, self._place, self.nbytes = layout(metadata, entries, alignment)
        self._missing = {entry.name: entry.spec for entry in entries}
        self._hidden = self.path.with_name(f".{self.path.name}.fewbit-new-{os.getpid()}-{secrets.token_hex(4)}")
        self._file = open(self._hidden, "xb")  # noqa: SIM115 - closed by __exit__
        try:
            self._file.write(header)
            self._file.truncate(self.nbytes)
        except BaseException:
            self._discard()
            raise

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its shape and dtype must be those of its entry's spec."""
        spec = self._missing.pop(name)
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {spec}")
        self._file.seek(self._place[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                return
            if self._missing:
                first = next(iter(self._missing))
                raise ValueError(f"{len(self._missing)} tensors were never written; the first is {first}")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self.path.exists() and not self.overwrite:
                raise PlanError(f"another process has written {self.path} meanwhile")
            self._hidden.replace(self.path)
        finally:
            self._discard()

    def _discard(self) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self._hidden.unlink()


def layout(
    metadata: Mapping[str, Any], entries: Sequence[Entry], alignment: int = ALIGNMENT
) -> tuple[bytes, dict[str, int], int]:
    """The padded header, the offset of each tensor in the file, and the size of the file."""
    if reasons := [reason for entry in entries if (reason := entry.why_not())]:
        raise PlanError("a GGUF file cannot hold this: " + "; ".join(reasons))
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("two tensors have the same name")
    if alignment != ALIGNMENT:
        metadata = {**metadata, "general.alignment": alignment}
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        out.append(_text(key) + _encoded(key, value))
    offsets, offset = {}, 0
    for entry in entries:
        offsets[entry.name] = offset
        dimensions = entry.shape[::-1]
        out.append(_text(entry.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        out.append(struct.pack("<IQ", _NUMBER_OF[entry.type], offset))
        offset = _aligned(offset + entry.spec.nbytes, alignment)
    header = b"".join(out)
    header += bytes(_aligned(len(header), alignment) - len(header))
    return header, {name: len(header) + at for name, at in offsets.items()}, len(header) + offset


def _encoded(key: str, value: Any) -> bytes:
    """A value's type and bytes."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, Strings):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + value.raw
    if isinstance(value, Sequence) and value and all(isinstance(each, str) for each in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, (bool, int, float)):
        value = _scalar(value)
    if isinstance(value, np.generic) and value.dtype in _KIND_OF:
        return struct.pack("<I", _KIND_OF[value.dtype]) + value.tobytes()
    if isinstance(value, Sequence):
        whole = all(isinstance(each, int) and not isinstance(each, bool) for each in value)
        floats = any(isinstance(each, float) for each in value)
        value = np.array(value, np.float32 if floats else np.int32 if whole else None)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in _KIND_OF:
        return struct.pack("<IIQ", _ARRAY, _KIND_OF[value.dtype], len(value)) + value.tobytes()
    raise TypeError(f"{key}: a GGUF file cannot hold the value {_shown(value)}")


def _scalar(value: bool | int | float) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    if value < 0:
        return np.int32(value) if value >= -(1 << 31) else np.int64(value)
    return np.uint32(value) if value < 1 << 32 else np.uint64(value)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _shown(value: object) -> str:
    return repr(value)[:80]
