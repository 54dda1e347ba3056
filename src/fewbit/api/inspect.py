"""The verbs. Each is short and does its work by asking the parts below it."""

from __future__ import annotations

from pathlib import Path

from fewbit.api.arguments import checked
from fewbit.models.decoding.sampling import Sampling as Sampling
from fewbit.models.describe import Inspection, describe
from fewbit.models.source import locate
from fewbit.texts.calibration import Calibration as Calibration


@checked
def inspect(model: str | Path) -> Inspection:
    """What is in a model's files, from their headers alone."""
    return describe(locate(model))
