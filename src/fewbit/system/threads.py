"""Computes several things at once, each in a thread that has one core to itself.

PyTorch splits an operation on at least 32768 entries over its threads, and waits for the slowest. If something else
runs on one of the cores, that wait takes ten times as long as the work. Threads that share no operation do not wait for
one another. In a thread of `each`, PyTorch does not split operations, so that these can be larger.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from fewbit.lazy import torch

T = TypeVar("T")
_MOST = 8  # more threads would wait for Python's lock
_SPLIT = 7 << 12  # below 32768: PyTorch does not split it
_ALONE = 1 << 16  # entries of float32 that stay in a core's cache


def entries() -> int:
    """Entries of a tensor on the CPU that are processed at a time.

    They stay in a core's cache, and they are so few that PyTorch does not split operations on them.
    """
    return _ALONE if torch.get_num_threads() == 1 else _SPLIT


def each(work: Sequence[Callable[[], T]]) -> list[T]:
    """The results of `work`, in order. If one raises an error, so does `each`, and what has not begun is left out."""
    count = min(_MOST, torch.get_num_threads(), len(work))
    if count < 2 or not _one_core():
        return [one() for one in work]

    def without_gradients(one: Callable[[], T]) -> T:
        with torch.no_grad():  # a setting of each thread
            return one()

    with ThreadPoolExecutor(count, initializer=_take_one_core) as pool:
        try:
            return [made.result() for made in [pool.submit(without_gradients, one) for one in work]]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@cache
def _one_core() -> bool:
    """Whether threads can be kept from splitting operations, which needs the OpenMP runtime of PyTorch."""
    with ThreadPoolExecutor(1, initializer=_take_one_core) as pool:
        return pool.submit(torch.get_num_threads).result() == 1


def _take_one_core() -> None:
    """Let PyTorch use one thread for operations of this thread, and leave those of other threads alone.

    `torch.set_num_threads` would also change a setting of the process. PyTorch applies that setting when it is first
    called in a thread, so that comes first.
    """
    torch.get_num_threads()
    try:
        limit = ctypes.CDLL(None).omp_set_num_threads  # PyTorch loads its OpenMP runtime with global symbols
    except (AttributeError, TypeError, OSError):
        return
    limit(1)
