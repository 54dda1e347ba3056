"""Strings in the metadata of a GGUF file: arrays that are decoded when they are used, and changes at the same place."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from fewbit.errors import FormatError

DAMAGED = "The file is damaged, or is not a GGUF file. Get it again."
_STRING = 8  # the type's number, see gguf.py
_length = struct.Struct("<Q").unpack_from


class Strings:
    """An array of strings in a file, decoded anew each time: a vocabulary takes up to 30 MB as Python strings."""

    def __init__(self, pages: mmap.mmap, start: int, count: int, where: str) -> None:
        """pages: the file. start: position of the first length. where: the file and the key, for errors.

        Only lengths are read here. FormatError if a string ends behind the file; when strings are decoded, if one is
        not valid UTF-8.
        """
        self.pages, self.start, self.count, self.where = pages, start, count, where
        at, size = start, len(pages)
        for number in range(count):
            if at + 8 > size or (at := at + 8 + _length(pages, at)[0]) > size:
                raise FormatError(f"{where}: string {number} ends behind the file, which has {size} bytes", DAMAGED)
        self.end = at

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        pages, at = self.pages, self.start
        for number in range(self.count):
            start, at = at + 8, at + 8 + _length(pages, at)[0]
            try:
                yield pages[start:at].decode()
            except UnicodeDecodeError:
                raise FormatError(f"{self.where}: string {number} is not valid UTF-8", DAMAGED) from None

    def tolist(self) -> list[str]:
        """All strings."""
        return [*self]

    def __repr__(self) -> str:
        return repr(self.tolist())

    @property
    def raw(self) -> bytes:
        """The strings as the file has them, each with its length."""
        return self.pages[self.start : self.end]


def replace_strings(path: Path, strings: Mapping[str, tuple[str, str]]) -> None:
    """Write other values of some keys into a GGUF file. strings: key -> its value now, and the new one.

    The new value may have fewer bytes in UTF-8; spaces at its end then fill the place. FormatError if it has more, or
    if the file does not have the value.
    """
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        for key, (old, new) in strings.items():
            before, after = old.encode(), new.encode()
            head = _sized(key.encode()) + struct.pack("<I", _STRING)
            at = pages.find(head + _sized(before))
            if at < 0 or len(after) > len(before):
                raise FormatError(f"{path}: {key} does not have the value to replace, or the new one is longer")
            at += len(head) + 8
            pages[at : at + len(before)] = after.ljust(len(before))


def _sized(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data
