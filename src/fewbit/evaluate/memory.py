"""How much memory this process has taken, as the operating system counts it. Linux; elsewhere what `resource` tells."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes. `anonymous`: resident and not backed by a file; `mapped`: resident pages of mapped files; `peak`: the most
    that was ever resident."""

    anonymous: int
    mapped: int
    peak: int


def now() -> Memory:
    """What this process holds at this moment."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Memory(anonymous=peak, mapped=0, peak=peak)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    size = {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM")}
    return Memory(anonymous=size["RssAnon"], mapped=size["RssFile"], peak=size["VmHWM"])
