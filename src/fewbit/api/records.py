"""The record of an output, and its model card: written with the output, and completed by what is measured later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.safetensors import CARD
from fewbit.models.describe import describe
from fewbit.models.provenance import provenance
from fewbit.models.scales import GGUF_RECORD
from fewbit.models.scales import read as folded_scales
from fewbit.models.source import Source
from fewbit.pipeline import replacing
from fewbit.report.card import model_card
from fewbit.system import publish
from fewbit.system.files import replace_text

EDITED = "README.md was edited, so it stays as it is; the record has the result"


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a folder that is complete otherwise, and its model card."""
    record["scales"] = folded_scales(folder).to_json()
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    record["files"] = sorted({*files, CARD, publish.RECORD})
    (folder / publish.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(record), encoding="utf-8")


def bare(source: Source) -> dict[str, Any]:
    """A record for the card of a model that has none: what its files say."""
    from fewbit import __version__

    found = describe(source)
    return {
        "model": source.origin.name,
        "recorded": False,
        "versions": {"fewbit": __version__},
        "plan": {"name": "not recorded", "format": found.format or "dense"},
        "calibration": None,
        "tensors": [],
        "notes": [],
        "converted": {"exact": False, "schemes": found.schemes},
        "bits_per_weight": found.bits_per_weight_quantized or found.bits_per_weight,
        "output_bytes": found.file_bytes,
        "base": provenance(source),
    }


def check_recorded(source: Source) -> dict[str, Any]:
    """The record of a local output of fewbit. PlanError if the model has none, or if it cannot be written."""
    record = describe(source).made
    if not record or source.hosted:
        raise PlanError(
            f"{source.name} has no record of fewbit to write the result into",
            "Omit `record`, or give an output of fewbit.",
        )
    if source.gguf is None:
        publish.check_writable(source.folder)
    else:
        if len(source.files) > 1:
            raise PlanError(f"{source.name} has several parts, so its record cannot be written again", "Omit `record`.")
        publish.check_output(source.files[0], overwrite=True, file=True)
        publish.check_space({source.files[0].resolve(): source.files[0].stat().st_size}, "Free some space.")
    return record


def complete(source: Source, found: Mapping[str, Any]) -> list[str]:
    """Add `found` to the record of an output, and to its card if nobody has edited it. Returns notes.

    A GGUF file holds its record, so it is written again, with the same tensors.
    """
    before = check_recorded(source)
    record = {**before, **found}
    if source.gguf is not None:
        with publish.published(source.files[0], overwrite=True, file=True) as place:
            replacing.with_metadata(GgufFile(source.files[0]), place, {GGUF_RECORD: json.dumps(record)})
        return []
    card = source.folder / CARD
    edited = card.is_file() and card.read_text(encoding="utf-8") != model_card(before)
    with publish.as_output_error(source.folder, "Free some space, or omit `record`: the result is then printed."):
        replace_text(source.folder / publish.RECORD, json.dumps(record, indent=1) + "\n")
        if not edited:
            replace_text(card, model_card(record))
    return [EDITED] if edited else []
