"""Inspect a model's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit.api.arguments import checked
from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile, is_gguf
from fewbit.models.decoding.sampling import Sampling as Sampling
from fewbit.models.describe import Inspection, describe, describe_tower, shown_keys
from fewbit.models.gguf.towers import is_tower
from fewbit.models.source import locate
from fewbit.names import path_of
from fewbit.texts.calibration import Calibration as Calibration


@checked
def inspect(model: str | Path, *, metadata: bool = False) -> Inspection:
    """Describe a model from the headers of its files: schemes, sizes, and how it was made.

    model: also a GGUF file with a vision or audio tower (mmproj). metadata: all keys of a GGUF file too. Of a list, its
    length and the first values. PlanError for a folder.
    """
    path = path_of(model)
    if path is not None and path.is_file() and is_gguf(path) and is_tower(tower := GgufFile(path)):
        found = describe_tower(tower)
        return replace(found, metadata=shown_keys(tower)) if metadata else found
    source = locate(model)
    if metadata and source.gguf is None:
        raise PlanError(f"{model} is a folder: only GGUF files have `metadata`", "Look at its config.json.")
    found = describe(source)
    return replace(found, metadata=shown_keys(GgufFile(source.files[0]))) if metadata else found
