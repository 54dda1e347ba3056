"""Measures elapsed time."""

from __future__ import annotations

import time
from collections.abc import Callable


def timed() -> Callable[[], float]:
    """A function that returns the seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
