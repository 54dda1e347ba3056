"""Outputs that are one GGUF file, split into several of a limited size (`max_shard`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fewbit.api import requested
from fewbit.errors import PlanError
from fewbit.formats.containers import gguf_parts, gguf_split
from fewbit.models.gguf.header import Header
from fewbit.pipeline import write_gguf
from fewbit.pipeline.settled import Settled
from fewbit.system import publish


def parts(out: Path, max_shard: int | None, *, overwrite: bool, file: bool) -> publish.Parts | None:
    """How the output is split; None if it is not. PlanError if it is a folder, or if parts of this name exist."""
    if max_shard is None:
        return None
    requested.check_split(file)
    if (there := gguf_parts.beside(out.resolve())) and not overwrite:
        raise PlanError(f"{there[0]} exists", "Use `overwrite=True` to replace it, or give another `out`.")
    return publish.Parts(partial(gguf_split.split, limit=max_shard), gguf_parts.beside)


def count(settled: Settled, header: Header | None, max_shard: int | None) -> int:
    """How many files the output becomes, before it is made. PlanError if it is a folder, or if they are too many."""
    if max_shard is None:
        return 1
    requested.check_split(header is not None)
    assert header is not None
    return write_gguf.files(settled, header, max_shard)


def written(out: Path) -> Path:
    """The output that was published as `out`: its first part if it was split."""
    return out if out.exists() else next(iter(gguf_parts.beside(out.resolve())), out)
