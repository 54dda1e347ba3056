"""Folders of safetensors files, the container of Hugging Face checkpoints: reads headers, writes shard by shard.

    8 bytes       the size of the header, u64, little-endian
    the header    JSON, padded with spaces so that the data begins at a multiple of 8:
                  {"__metadata__": {"format": "pt"},
                   "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the data      tensors row by row, little-endian; offsets count from the first byte after the header

The package `safetensors` checks header length, offsets and overlaps. This file adds the name of the faulty file to
errors, and checks that an index and its shards agree.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fewbit.errors import FormatError
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec
from fewbit.system import heap
from fewbit.system.files import read_json, write_json
from fewbit.system.publish import RECORD

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DAMAGED = "The file is damaged or incomplete. Get it again."
LACKING = "The download is incomplete. Get the missing file."
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
CARD, ORIGINAL_CARD = "README.md", "README-original.md"  # a folder's model card, and the one of its original
_NOT_CARRIED = (CARD, RECORD, "fewbit.scales")
# Quantization configs of other tools. An output has its own in config.json, and some readers prefer these files.
_QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_DTYPES = {  # safetensors' name -> torch's name
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}
# The order of tensors in a file, by dtype. Within one dtype, they are sorted by name.
_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


class Checkpoint:
    """The tensors of some safetensors files. `specs` come from the headers; data is memory-mapped on request.

    Tensors that are computed from those of the files can be added, and tensors can be hidden.
    """

    def __init__(self, files: list[Path]) -> None:
        self.specs: dict[str, PartSpec] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._added: dict[str, Any] = {}
        self._places: dict[Path, tuple[int, int]] = {}  # the addresses where files are mapped
        for file in files:
            for name, spec in read_specs(file).items():
                if name in self.specs:
                    raise FormatError(f"{name} is both in {self._file_of[name].name} and in {file.name}")
                self.specs[name], self._file_of[name] = spec, file

    def add(self, name: str, spec: PartSpec, handle: Any) -> None:
        """Add a tensor, or replace one of the files. `handle[index]` gives its data, `handle.get_shape()` its shape."""
        self.specs[name], self._added[name] = spec, handle

    def hide(self, names: Iterable[str]) -> None:
        """Remove tensors from `specs`. `stored` still reads them."""
        for name in names:
            self.specs.pop(name, None)

    def add_view(self, name: str, stored: str, view: Callable[[Any], Tensor]) -> None:
        """Add a tensor `name` that is a part of the tensor `stored`: `view` takes a lazy handle of `stored`."""
        part = view(torch.empty(self.specs[stored].shape, dtype=self.specs[stored].dtype, device="meta"))
        self.add(name, PartSpec.of(part), _View(stored, self.slice(stored), view, tuple(part.shape)))

    def is_part(self, name: str) -> bool:
        """Whether the tensor is a part of another one."""
        return isinstance(self._added.get(name), _View)

    def whole_of(self, name: str) -> str:
        """The tensor that `name` is a part of, or `name`."""
        added = self._added.get(name)
        return added.name if isinstance(added, _View) else name

    def stored(self, name: str) -> Any:
        """A lazy handle of a tensor as the files hold it."""
        return self._handle(name).get_slice(name)

    def called(self, name: str) -> str:
        """The tensor's name for an error. For a part, also the name of the stored tensor."""
        added = self._added.get(name)
        return f"{name} (a part of {added.name})" if isinstance(added, _View) else name

    def slice(self, name: str) -> Any:
        """A lazy handle, as transformers' loader expects."""
        return self._added[name] if name in self._added else self.stored(name)

    def get(self, name: str) -> Tensor:
        """The tensor, memory-mapped unless it is computed."""
        tensor: Tensor = self._added[name][...] if name in self._added else self._handle(name).get_tensor(name)
        return tensor

    def drop_pages(self) -> None:
        """Remove what was read of the files from this process's memory. It comes back when it is read again.

        Mapped pages count as resident memory until the system needs them, so a process would appear to hold the whole
        checkpoint. Values that a caller wrote into a tensor of `get` are lost.
        """
        for file, handle in self._open.items():
            if file not in self._places:
                whole = [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118 - a handle is not a mapping
                places = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in whole if t.nbytes]  # an empty one has none
                self._places[file] = min(places)[0] if places else 0, max(places)[1] if places else 0
        heap.drop_mapped(self._places.values())

    def _handle(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]


@dataclass(frozen=True)
class _View:
    """A lazy handle of a tensor that is a part of another one."""

    name: str  # of that one
    whole: Any
    view: Callable[[Any], Tensor]
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Tensor:
        return self.view(self.whole)[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)


def read_specs(file: Path) -> dict[str, PartSpec]:
    """Shapes and dtypes of the tensors in one file, from its header. FormatError if it is not valid safetensors."""
    try:
        with safe_open(file, framework="pt") as handle:
            specs = {}
            for name in handle.keys():  # noqa: SIM118 - a handle is not a mapping
                view = handle.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise FormatError(f"{file}: {name} has unknown dtype {view.get_dtype()}")
                specs[name] = PartSpec(tuple(view.get_shape()), getattr(torch, _DTYPES[view.get_dtype()]))
            return specs
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise FormatError(f"{file} ({size:,} bytes) is not a valid safetensors file: {error}", _DAMAGED) from None


def files_in(folder: Path, name: str | None = None) -> list[Path]:
    """The safetensors files of a Hugging Face folder; empty if there are none. FormatError if a shard is missing.

    name: the name of the file or index, if it is not the usual one.
    """
    if name is not None and not name.endswith(".index.json"):
        return [folder / name]
    index = folder / (name or INDEX)
    if not index.exists():
        return [folder / SINGLE] if (folder / SINGLE).exists() else []
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index} is not a valid index of shards: {error!r}") from None
    files = [folder / str(name) for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(str(name)).name != name or not file.is_file():
            raise FormatError(f"{index} names {name!r}, which is not in {folder}", LACKING)
    return files


class ShardWriter:
    """Writes tensors to `folder` in shards of at most `limit` bytes, and then the index. It keeps no tensor in memory.

    specs: name -> header of each tensor that `add` will get. Shards are filled in this order. `add` takes the tensors
    in any order; each shard is flushed to disk when it is complete.
    """

    def __init__(self, folder: Path, specs: Mapping[str, PartSpec], limit: int = 2 << 30) -> None:
        self.folder = folder
        self._shards: list[dict[str, PartSpec]] = []
        self._begun: dict[int, FileWriter] = {}
        self.nbytes, filled = 0, limit
        for name, spec in specs.items():
            if not self._shards or (self._shards[-1] and filled + spec.nbytes > limit):
                self._shards.append({})
                filled = 0
            self._shards[-1][name] = spec
            filled += spec.nbytes
            self.nbytes += spec.nbytes
        self._shard_of = {name: number for number, shard in enumerate(self._shards) for name in shard}

    def adopt(self) -> None:
        """Use the files that are already in the folder as the last shards. No tensor may have been added."""
        for file in files_in(self.folder):
            self._shards.append(read_specs(file))
            self.nbytes += sum(spec.nbytes for spec in self._shards[-1].values())
            file.rename(self._place(len(self._shards) - 1))
        (self.folder / INDEX).unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Its shape and dtype must be those of its spec."""
        number = self._shard_of[name]
        if number not in self._begun:
            self._begun[number] = FileWriter(self._place(number), self._shards[number])
        self._begun[number].add(name, tensor)
        if self._begun[number].complete:
            self._begun.pop(number).close()

    def close(self) -> None:
        """Name the shards, and write the index if there are several. ValueError if a tensor is missing."""
        for writer in self._begun.values():
            writer.close()
        if len(self._shards) == 1:
            self._place(0).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, specs in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._place(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(specs, final)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index, indent=2)

    def _place(self, number: int) -> Path:
        return self.folder / f"shard-{number + 1}"


class FileWriter:
    """Writes one safetensors file, one tensor at a time in any order. The package safetensors writes whole files only.

    The file has the bytes that the package would write. Source: https://github.com/huggingface/safetensors, "Format".
    """

    def __init__(self, path: Path, specs: Mapping[str, PartSpec], metadata: Mapping[str, str] | None = None) -> None:
        called = {getattr(torch, kind): name for name, kind in _DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._places: dict[str, int] = {}
        end = 0
        # The widest numbers first, so that all are aligned.
        for name in sorted(specs, key=lambda name: (_ORDER.index(called[specs[name].dtype]), name)):
            spec = specs[name]
            self._places[name], end = end, end + spec.nbytes
            offsets = [self._places[name], end]
            header[name] = {"dtype": called[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._path, self._missing = 8 + len(text), path, dict(specs)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + end)

    @property
    def complete(self) -> bool:
        return not self._missing

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Its shape and dtype must be those of its spec."""
        spec = self._missing.pop(name)
        if PartSpec.of(tensor) != spec:
            raise ValueError(f"{name} is {PartSpec.of(tensor)}, expected {spec}")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with open(self._path, "r+b") as file:
            file.seek(self._start + self._places[name])
            file.write(flat.numpy().data)

    def close(self) -> None:
        """Flush the file to disk. ValueError if a tensor is missing."""
        if self._missing:
            first = next(iter(self._missing))
            raise ValueError(f"{len(self._missing)} tensors were never written; the first is {first}")
        with open(self._path, "r+b") as file:
            os.fsync(file.fileno())


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file and flush it to disk. It may replace the file that the tensors are mapped from."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        writer = FileWriter(unfinished, {name: PartSpec.of(tensor) for name, tensor in tensors.items()}, metadata)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def writing() -> Iterator[None]:
    """A context that turns safetensors' error for a failed write into OSError, as other writers raise it."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error


def rewritten(path: Path, out: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a copy of a file, with `tensors` in place of its tensors of these names."""
    with safe_open(path, framework="pt") as handle:
        names, metadata = list(handle.keys()), dict(handle.metadata() or {})
        write_file(
            out, {name: tensors[name] if name in tensors else handle.get_tensor(name) for name in names}, metadata
        )


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in a file's header. Empty for what is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write other texts into a file's header, at its place: nothing else in the file moves.

    Spaces at the header's end fill the place. FormatError if the texts need more room than those before.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": dict(metadata)}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise FormatError(f"{path}: its header has no room for the new metadata")
        file.seek(8)
        file.write(text.ljust(size))


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one file, and its metadata."""
    read_specs(path)
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118


def other_weights(folder: Path) -> list[Path]:
    """Weight files that are not part of the model: adapters, draft models, extra heads, other frameworks' weights."""
    own = {file.name for file in files_in(folder)}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in _WEIGHT_SUFFIXES]
    return [file for file in files if file.name not in own and not file.name.startswith(".")]


def side_files(folder: Path) -> list[Path]:
    """The files of a model besides its weights, as paths relative to `folder`.

    These are tokenizer, configs, templates, code, licence, and subfolders without weights, such as one with further
    chat templates. The model card is not included.
    """
    paths = [file for file in _visible(folder) if file.is_file() and not _is_weights(file)]
    paths = [file for file in paths if file.name not in _NOT_CARRIED]
    for inner in _visible(folder):
        if inner.is_dir() and not _holds_weights(inner):
            paths += [file for file in sorted(inner.rglob("*")) if file.is_file()]
    return [file.relative_to(folder) for file in paths]


def copy_side_files(folder: Path, out: Path, *, quantized: bool = False) -> None:
    """Copy the side files of `folder` into `out`. Files that exist there are kept.

    quantized: `out` has the same weights, so quantization configs are copied too. The model card is copied as
    `ORIGINAL_CARD`, because it does not describe the model in `out`.
    """
    for file in side_files(folder):
        target = out / file
        if not target.exists() and (quantized or file.name not in _QUANTIZATION):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)
    if (card := card_of(folder)) is not None and not (out / ORIGINAL_CARD).exists():
        shutil.copyfile(card, out / ORIGINAL_CARD)


def card_of(folder: Path) -> Path | None:
    """The model card in a folder; None if there is none, or if fewbit wrote it."""
    card = folder / CARD
    return card if card.is_file() and not (folder / RECORD).exists() else None


def folders_left_out(folder: Path) -> list[Path]:
    """Subfolders that contain weights. They are not copied with the side files."""
    return [inner for inner in _visible(folder) if inner.is_dir() and _holds_weights(inner)]


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")


def _holds_weights(folder: Path) -> bool:
    return any(_is_weights(file) for file in folder.rglob("*"))
