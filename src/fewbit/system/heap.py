"""Memory that is done with goes back to the system: freed tensors, and pages of mapped files. Linux with glibc;
elsewhere nothing happens.

glibc takes pieces above a threshold from the system, each for itself, and the rest from a heap that only shrinks at its
end. By default the threshold rises to 32 MiB as pieces are freed, and the heap fragments: half a gigabyte that nobody
used, while a 1.1B model was quantized block by block (benchmarks/memory.py).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

DoneWith = Callable[[Iterable[Tensor], Iterable[Tensor]], None]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MADV_DONTNEED = 4  # <bits/mman-linux.h>: pages that are read again come from their file again

_now: list[int] = [32 << 20]  # where the threshold ends if left alone


def return_freed(threshold: int = 4 << 20) -> None:
    """From now on, freed tensors of `threshold` bytes and more go back to the operating system at once.

    Below it, up to four times as much stays at hand: pages that come and go with every operation cost AWQ's search a
    fifth of its time.
    """
    _now[0] = threshold
    _set(threshold, spare=4 * threshold)


@contextmanager
def tight() -> Iterator[DoneWith]:
    """Within, what is freed is gone, for work that takes many pieces of some megabytes and keeps smaller ones.

    Laid out anew for kernels, the weights of a 135M GPTQ model left 170 MB of holes beside 120 MB; so they leave 8.

    What is yielded is to be told which tensors were read, and which are kept: of those that were read, and that nobody
    uses any more, the pages of mapped files go. They would stay in memory as long as anything of the file is in use,
    which an embedding always is, and a model whose codes are laid out anew would be there twice.
    """
    files = _mapped()
    gone: list[tuple[int, int]] = []

    def done_with(read: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
        held, done = _places(kept), _places(read)
        done = [(start, stop) for start, stop in done if not any(a < stop and start < b for a, b in held)]
        done = [(start, stop) for start, stop in done if any(a <= start and stop <= b for a, b in files)]
        _give_back(done)
        gone.extend(done)

    _set(256 << 10, spare=128 << 10)
    try:
        yield done_with
    finally:
        _give_back(gone)  # pages too that were shared by tensors that went one after the other
        _set(_now[0], spare=2 * _now[0])


def _places(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]


def _give_back(places: Iterable[tuple[int, int]]) -> None:
    """The pages that lie wholly in these places, of which some follow upon others."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(places):
        if runs and runs[-1][1] == start:
            start, _ = runs.pop()
        runs.append((start, stop))
    for start, stop in runs:
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def _mapped() -> list[tuple[int, int]]:
    """Addresses where files of data, not of code, are mapped."""
    maps, found = Path("/proc/self/maps"), []
    if sys.platform == "linux" and maps.exists():
        # Fields: addresses, rights, offset, device, inode, path.
        for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, rights, _, _, *place = line.split(maxsplit=5)
            if len(place) > 1 and place[1].startswith("/") and "x" not in rights:
                start, stop = (int(address, 16) for address in addresses.split("-"))
                found.append((start, stop))
    return found


def _set(threshold: int, *, spare: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, threshold)
        mallopt(_M_TRIM_THRESHOLD, 2 * spare)
        mallopt(_M_TOP_PAD, spare)
