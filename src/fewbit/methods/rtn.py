"""Round to nearest: every weight takes the nearest value of a grid that spans its group, and no data is needed.

The baseline that every other method is measured against. Rounding ties go to even; scales are rounded to their stored
precision first.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.methods.base import Method
from fewbit.registry import register


@register("methods", "rtn")
@dataclass(frozen=True)
class RoundToNearest(Method):
    """No options, no calibration."""
