"""Round to nearest: each weight becomes the nearest value of a grid that spans its group. No data is needed.

    q = argmin over grid values v of |w - v|

This is the baseline for all other methods. Scales are rounded as stored first; ties are rounded to even. A scheme may
follow another library instead (`Scheme.nearest`).
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.methods.base import Method
from fewbit.registry import register


@register("methods", "rtn")
@dataclass(frozen=True)
class RoundToNearest(Method):
    """No options, no calibration."""
