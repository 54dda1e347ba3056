"""Replaces strings in the metadata of a GGUF file, at their place: nothing else in the file moves."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

from fewbit.errors import FormatError

_STRING = 8  # the type's number, see gguf.py


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
