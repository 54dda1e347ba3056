"""Models that are split over several GGUF files: name-00001-of-00003.gguf and so on.

The first file has the metadata. Every file has `split.no`, its number from 0, `split.count` and `split.tensors.count`,
the number of tensors in all files. llama.cpp loads the first, and finds the others by their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fewbit.errors import FormatError

MOST = 65535  # `split.count` has 16 bits
KEYS = ("split.no", "split.count", "split.tensors.count")
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def named(path: Path, count: int) -> list[Path]:
    """The files of a model that would be at `path` as one file."""
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def beside(path: Path) -> list[Path]:
    """The files, in the folder, of split models that would be at `path` as one file."""
    found = sorted(path.parent.glob("*-of-*.gguf")) if path.parent.is_dir() else []
    return [file for file in found if (match := _NAME.fullmatch(file.name)) and f"{match['stem']}.gguf" == path.name]


def siblings(path: Path) -> list[Path]:
    """All files of the split model that has `path`, by its name. Only `path` if its name is not that of a part."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MOST:
        return [path]
    return named(path.with_name(f"{match['stem']}.gguf"), int(match["count"]))


def is_later(path: Path) -> bool:
    """Whether the file's name is that of a part of a split model, other than the first."""
    return siblings(path)[0] != path


def first_of(path: Path) -> Path:
    """The first file of the model that has the part `path`. FormatError if it is not there."""
    first = siblings(path)[0]
    if first == path:
        raise FormatError(f"{path} says that it is a later part of a split model, but its name does not")
    return _there(first, path)


def others(path: Path, count: int) -> Iterator[Path]:
    """The other files of a model of `count` files, whose first is `path`. FormatError if one is not there."""
    found = siblings(path)
    if len(found) != count or found[0] != path:
        raise FormatError(f"{path} says that it is one of {count} files, but its name does not")
    return (_there(file, path) for file in found[1:])


def _there(file: Path, part: Path) -> Path:
    if not file.is_file():
        raise FormatError(
            f"{file} is missing", f"{part.name} is one of {len(siblings(part))} files, which must be in one folder."
        )
    return file
