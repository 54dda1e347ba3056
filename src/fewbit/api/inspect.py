"""Inspect a model's files."""

from __future__ import annotations

from pathlib import Path

from fewbit.api.arguments import checked
from fewbit.models.decoding.sampling import Sampling as Sampling
from fewbit.models.describe import Inspection, describe
from fewbit.models.source import locate
from fewbit.texts.calibration import Calibration as Calibration


@checked
def inspect(model: str | Path) -> Inspection:
    """Describe a model from the headers of its files: schemes, sizes, and how it was made."""
    return describe(locate(model))
