"""Formats numbers with units for display, and reads sizes."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def duration(seconds: float) -> str:
    """A duration for display: 0.42 s, 37 s, 2 min 05 s."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def age(seconds: float) -> str:
    """An age for display, in its largest whole unit: 12 min, 5 h, 3 days."""
    for unit, scale in (("day", 86400), ("h", 3600), ("min", 60)):
        if (count := int(seconds // scale)) >= 1:
            return counted(count, unit, "" if unit == "day" else unit)
    return f"{int(seconds)} s"


def counted(count: int, unit: str, units: str = "") -> str:
    """A count with its unit for display: 1 token, 1,024 tokens. units: the plural, if it is not `unit` with an s.

    >>> counted(1, "token"), counted(1024, "token"), counted(0, "entry", "entries")
    ('1 token', '1,024 tokens', '0 entries')
    """
    return f"{count:,} {unit if count == 1 else units or unit + 's'}"


def share(value: float) -> str:
    return f"{value:.1%}"


def size(nbytes: float) -> str:
    """A size in bytes for display: 98.4 MB, 1.23 GB (decimal units)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        rounded = float(f"{nbytes / scale:.3g}")
        if rounded >= 1:
            return f"{rounded:,g} {unit}"
    return f"{nbytes:.0f} B"


def nbytes(text: str) -> int | None:
    """Bytes that `8GB`, `8 GiB`, `512MB` or a plain number mean; None for another text, and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    return int(float(match[1]) * _UNITS[match[2] or ""]) or None if match else None
