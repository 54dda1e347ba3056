"""How much memory this process has taken, as the operating system counts it. Linux; elsewhere what `resource` tells."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Memory:
    """Bytes. `anonymous`: resident and not backed by a file; `mapped`: resident pages of mapped files; `peak`: the most
    that was ever resident."""

    anonymous: int
    mapped: int
    peak: int


def on_gpus() -> int:
    """The most bytes that torch ever held on all CUDA devices together; 0 where there are none."""
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def return_freed(threshold: int = 4 << 20) -> None:
    """From now on, freed tensors of `threshold` bytes and more go back to the operating system at once (glibc only).

    By default glibc raises that limit to 32 MiB as it goes and keeps smaller pieces in a heap that fragments: half a
    gigabyte that nobody used, while a 1.1B model was quantized block by block (benchmarks/memory.py).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, threshold)


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
