"""Returns unused memory to the operating system: freed tensors, and pages of mapped files.

This works on Linux with glibc. Elsewhere these functions do nothing.

glibc requests each allocation above a threshold from the system separately (mmap). Smaller ones come from a heap, which
can only shrink at its end. By default the threshold rises to 32 MiB as memory is freed, and then the heap fragments:
half a gigabyte was unused while a 1.1B model was quantized block by block (benchmarks/memory.py).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbit.lazy import Tensor

DoneWith = Callable[[Iterable[Tensor], Iterable[Tensor]], None]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MADV_DONTNEED = 4  # <bits/mman-linux.h>; if dropped pages are read again, they are loaded from their file

_threshold: list[int] = [32 << 20]  # the current threshold; glibc's own reaches 32 MiB


def return_freed(threshold: int = 4 << 20) -> None:
    """From now on, return freed tensors of at least `threshold` bytes to the operating system at once.

    The heap for smaller ones keeps up to four times `threshold` free bytes. Without that reserve, pages would be
    returned and requested again with every operation, which cost AWQ's search a fifth of its time.
    """
    _threshold[0] = threshold
    _set(threshold, top_pad=4 * threshold)


@contextmanager
def trimmed() -> Iterator[DoneWith]:
    """Inside the block, return freed memory at once. For work that frees many tensors of a few MB and keeps small ones.

    Example: converting a 135M GPTQ model (120 MB) to the kernels' layout left 170 MB of holes in the heap. With this
    context manager it leaves 8 MB.

    The block receives a function `done_with(read, kept)`: the tensors that were read, and those that are still in use.
    It drops the pages of mapped files under tensors in `read` that do not overlap any in `kept`. Otherwise these pages
    stay in memory as long as any tensor of the file is in use, which is always the case for an embedding, and a model
    that is converted to another layout would be in memory twice.
    """
    files, gone = _mapped(), list[tuple[int, int]]()
    held: dict[tuple[int, int], Tensor] = {}  # one tensor of each file, so that no other data takes its addresses

    def is_mapped(tensor: Tensor) -> bool:
        place = _place(tensor)
        if (file := _file_of(place, files)) is not None and file not in held:
            files[:] = _mapped()  # the file may have been closed since, and its addresses may hold other data
            if (file := _file_of(place, files)) is not None:
                held[file] = tensor
        return file is not None

    def done_with(read: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
        used = [_place(tensor) for tensor in kept]
        done = [_place(tensor) for tensor in read if is_mapped(tensor)]
        done = [(start, stop) for start, stop in done if not any(a < stop and start < b for a, b in used)]
        _give_back(done)
        gone.extend(done)

    _set(256 << 10, top_pad=128 << 10)
    try:
        yield done_with
    finally:
        _give_back(gone)  # again for all: a page shared by two tensors can only be dropped once both are done
        held.clear()
        _set(_threshold[0], top_pad=2 * _threshold[0])
        _trim()


def drop_mapped(places: Iterable[tuple[int, int]]) -> None:
    """Drop the pages in these address ranges. Ranges outside of mapped files are left alone."""
    files = _mapped()
    _give_back([place for place in places if _file_of(place, files) is not None])


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _file_of(place: tuple[int, int], files: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The mapped file that holds this address range; None if there is none."""
    return next((file for file in files if file[0] <= place[0] and place[1] <= file[1]), None)


def _give_back(places: Iterable[tuple[int, int]]) -> None:
    """Drop the pages that lie completely inside these address ranges. Adjacent ranges are merged first."""
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
    """Address ranges where data files are mapped; executable mappings (code) are left out."""
    maps, found = Path("/proc/self/maps"), []
    if sys.platform == "linux" and maps.exists():
        # Fields: addresses, rights, offset, device, inode, path.
        for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
            addresses, rights, _, _, *place = line.split(maxsplit=5)
            if len(place) > 1 and place[1].startswith("/") and "x" not in rights:
                start, stop = (int(address, 16) for address in addresses.split("-"))
                found.append((start, stop))
    return found


def _trim() -> None:
    """Return the free pages between the heap's used ones, too."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _set(threshold: int, *, top_pad: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, threshold)
        mallopt(_M_TRIM_THRESHOLD, 2 * top_pad)
        mallopt(_M_TOP_PAD, top_pad)
