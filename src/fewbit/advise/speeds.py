"""How fast plans of a model were timed on this machine: kept by `fewbit compare`, found by `fewbit recommend`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fewbit.errors import FormatError
from fewbit.measure.comparison import Row, Timing, parsed, plain
from fewbit.models.source import Source
from fewbit.system import kept, machine
from fewbit.system.cache import cache_folder
from fewbit.system.files import read_json, replace_text


def keep(source: Source, device: str, rows: Sequence[Row]) -> None:
    """Save the decoding speeds of these rows. Speeds of other plans timed before are kept."""
    timed = {row.plan: row.speed.decode for row in rows if row.done and row.speed is not None}
    place = _place(source, device)
    place.parent.mkdir(parents=True, exist_ok=True)
    every = {**known(source, device), **timed}
    replace_text(place, json.dumps({plan: plain(timing) for plan, timing in every.items()}))
    kept.label(place, source.name, "speeds of plans")


def known(source: Source, device: str) -> dict[str, Timing]:
    """Decoding tokens/s by plan. Empty if this model was not timed here, or if the file is damaged."""
    place = _place(source, device)
    try:
        found = read_json(place)
        return {plan: parsed(Timing, timing, str(place)) for plan, timing in found.items()}
    except (OSError, AttributeError, FormatError):
        return {}


def _place(source: Source, device: str) -> Path:
    """The file for this model, as it is now, on this processor or GPU."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    what = json.dumps([files, source.config, machine.processor(), torch.get_num_threads(), device, gpu], sort_keys=True)
    return cache_folder() / "compare" / f"speeds-{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"
