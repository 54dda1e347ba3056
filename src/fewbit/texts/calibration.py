"""Settings of the calibration data."""

from __future__ import annotations

from dataclasses import dataclass

from fewbit import checks
from fewbit.checks import Texts
from fewbit.settings import Settings, setting
from fewbit.texts import sources


@dataclass(frozen=True)
class Calibration(Settings):
    """Windows of a text that a model is calibrated on. ArgumentError for an invalid value."""

    text: Texts | None = setting(
        None,
        sources.checked_or_self,
        "Text to calibrate on: a .txt or .jsonl file, or pydoc, tiny, wikitext2, c4. "
        "Default: tiny for the embedded model, else pydoc.",
    )
    samples: int = setting(128, checks.integer(1), "Number of calibration windows, drawn at random.")
    length: int = setting(512, checks.integer(1), "Tokens in a calibration window, at most the model's context.")
    seed: int = setting(0, checks.integer(0, checks.MAX_SEED), "Random seed.")


COMPARED = Calibration(samples=32, length=256)  # what `compare` calibrates on by default: enough to rank the plans
