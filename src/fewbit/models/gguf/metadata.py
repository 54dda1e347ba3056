"""Typed access to the keys of a GGUF file that describe its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fewbit.checks import is_finite
from fewbit.errors import FormatError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.gguf import hybrid
from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.architectures import ARCHITECTURES, of_file

_LONGEST = 1 << 31
_TOWER = (
    "the vision or audio tower of a model (mmproj)",
    "Give the GGUF file of the language model; for images, this file is its `mmproj`.",
)
# general.type or general.architecture of files that are not models -> what they are, and what to do with them
_OTHERS = {
    "adapter": ("a LoRA adapter", "Give the model, and this file as `adapter`."),
    "mmproj": _TOWER,
    "clip": _TOWER,
    "imatrix": ("an importance matrix", "Give the model, and this file to quantize as `imatrix`."),
}


def damaged(path: Path, what: str) -> FormatError:
    """The error for a file with an entry that cannot be right. what: which entry, and what is wrong with it."""
    return FormatError(f"{path}: {what}", "The file is damaged, or of an unsupported kind.")


class Keys:
    """Typed access to the keys of a file that begin with `prefix`. FormatError for a wrong type or range.

    layers: how many equal entries an array has that counts as one number.
    """

    def __init__(self, file: GgufFile, prefix: str, layers: int = 0) -> None:
        self.file, self.prefix, self.layers = file, prefix, layers

    def wrong(self, what: str) -> FormatError:
        return damaged(self.file.path, what)

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """An integer above 0. An array with one equal entry per layer counts as this entry."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and 0 < len(value) == self.layers and (value == value[0]).all():
            value = value[0].item()
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LONGEST:
            raise self.wrong(f"{self.prefix}.{key} is {str(value)[:80]}, not an integer above 0")
        return value

    def ratio(self, key: str, other: str) -> int:
        """How many times one key is another."""
        one, two = self.count(key), self.count(other)
        if one % two:
            raise self.wrong(f"{self.prefix}.{key} is {one}, which is no multiple of {other}, {two}")
        return one // two

    def whole(self, key: str, default: int = 0) -> int:
        """An integer from 0."""
        value = self.get(key, default)
        none = isinstance(value, int) and not isinstance(value, bool) and value == 0
        return 0 if none else self.count(key, default)

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal of the same float32: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key)
        value = default if value is None else value
        if not is_finite(value):
            raise self.wrong(f"{self.prefix}.{key} is {str(value)[:80]}, not a finite number")
        return float(str(np.float32(value)))

    def reals(self, key: str, count: int) -> list[float]:
        """A list of so many finite numbers, as `real`."""
        value = self.get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or len(value) != count:
            raise self.wrong(f"{self.prefix}.{key} is {str(value)[:80]}, not {count} numbers")
        if not np.isfinite(value).all():
            raise self.wrong(f"{self.prefix}.{key} has numbers that are not finite")
        return [float(str(np.float32(each))) for each in value]

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(f"{self.prefix}.{key} is {str(value)[:80]}, neither true nor false")
        return value

    def flags(self, key: str, count: int) -> list[bool]:
        """A list of so many entries, each true or false."""
        value = self.get(key)
        if not isinstance(value, np.ndarray) or value.dtype != bool or len(value) != count:
            raise self.wrong(f"{self.prefix}.{key} is {str(value)[:80]}, not {count} times true or false")
        return [bool(each) for each in value]

    def wholes(self, key: str, least: int, lowest: int = 0) -> list[int]:
        """A list of at least so many integers from `lowest`."""
        value = self.get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) < least:
            raise self.wrong(f"{self.prefix}.{key} is {str(value)[:80]}, not a list of at least {least} integers")
        if (value < lowest).any():
            raise self.wrong(f"{self.prefix}.{key} is {str(value)[:80]}, with numbers below {lowest}")
        return [int(each) for each in value]

    def shape(self, name: str, dimensions: int = 2) -> tuple[int, ...]:
        """The shape of a required matrix, or of a required tensor with so many dimensions."""
        entry = self.file.entries.get(name)
        if entry is None or len(entry.shape) != dimensions:
            raise self.wrong(f"it has no {'matrix' if dimensions == 2 else f'{dimensions}-dimensional tensor'} {name}")
        return entry.shape


class Metadata(Keys):
    """The keys of a language model, under the name of its architecture. FormatError for another kind of file."""

    def __init__(self, file: GgufFile) -> None:
        for key in ("general.type", "general.architecture"):  # older files of towers have no type
            if isinstance(kind := file.metadata.get(key), str) and kind in _OTHERS:
                raise FormatError(f"{file.path} is {_OTHERS[kind][0]}, not a model", _OTHERS[kind][1])
        found = of_file(file)
        if found is None:
            name = str(file.metadata.get("general.architecture"))[:80]
            raise FormatError(
                f"{file.path}: architecture {name!r} is not one that fewbit loads",
                f"Supported architectures: {', '.join(sorted(ARCHITECTURES))}.",
            )
        self.architecture: Architecture = found
        own = file.entries.keys() - hybrid.beyond(file)
        blocks = {entry.split(".", 2)[1] for entry in own if entry.startswith("blk.") and entry.count(".") > 1}
        super().__init__(file, found.name, len(blocks))

    def first(self, name: str) -> str:
        """The tensor `name` of the first block that has it."""
        return next((whole for i in range(self.layers) if (whole := f"blk.{i}.{name}") in self.file.entries), name)
