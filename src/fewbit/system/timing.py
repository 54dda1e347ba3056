"""Time that passed."""

from __future__ import annotations

import time
from collections.abc import Callable


def timed() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
