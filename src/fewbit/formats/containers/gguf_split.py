"""Splits a GGUF file into several of a limited size, as llama.cpp's gguf-split does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.errors import PlanError
from fewbit.formats.containers import gguf_parts
from fewbit.formats.containers.gguf import ALIGNMENT, Entry, GgufFile, GgufWriter, layout


def split(path: Path, limit: int) -> list[Path]:
    """Replace the file at `path` by files beside it of at most `limit` bytes each; returns them.

    A tensor that is larger has a file of its own. If all fits one file, it stays as it is. The tensors keep their
    order. PlanError if there would be more files than a name can count.
    """
    if path.stat().st_size <= limit:
        return [path]
    file = GgufFile(path)
    groups = _grouped([*file.entries.values()], file.metadata, limit)
    parts = gguf_parts.named(path, len(groups))
    for number, (part, entries) in enumerate(zip(parts, groups, strict=True)):
        with GgufWriter(part, _keys(file.metadata, len(file.entries), number, len(groups)), entries) as writer:
            for entry in entries:
                writer.add(entry.name, file.get(entry.name))
                file.release(entry.name)
    path.unlink()
    return parts


def count(entries: Sequence[Entry], metadata: Mapping[str, Any], limit: int) -> int:
    """How many files `split` makes of a file with these tensors and keys. PlanError if they are too many for a name."""
    return 1 if layout(metadata, entries, ALIGNMENT)[2] <= limit else len(_grouped(entries, metadata, limit))


def _keys(metadata: Mapping[str, Any], tensors: int, number: int, count: int) -> dict[str, Any]:
    own = dict(zip(gguf_parts.KEYS, (np.uint16(number), np.uint16(count), np.int32(tensors)), strict=True))
    kept = {key: value for key, value in metadata.items() if key != "general.alignment"}
    return kept | own if number == 0 else own


def _grouped(entries: Sequence[Entry], metadata: Mapping[str, Any], limit: int) -> list[list[Entry]]:
    """The tensors of each file. The first has none if only the metadata fits it."""
    groups: list[list[Entry]] = [[]]
    empty = [len(layout(_keys(metadata, len(entries), number, 1), [])[0]) for number in (0, 1)]
    size = empty[0]
    for entry in entries:
        more = 24 + len(entry.name.encode()) + 8 * len(entry.shape) + _aligned(entry.spec.nbytes)
        if size + more + ALIGNMENT > limit and (groups[-1] or len(groups) == 1):
            groups.append([])
            size = empty[1]
        groups[-1].append(entry)
        size += more
    if len(groups) > gguf_parts.MOST:
        raise PlanError(f"{len(groups)} files are more than {gguf_parts.MOST}", "Give a larger `max_shard`.")
    return groups


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
