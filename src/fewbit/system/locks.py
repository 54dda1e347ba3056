"""Working folders that belong to one running process, on this machine or on another that shares the disk.

A process owns a folder by holding a lock on a file in it. The kernel releases the lock when the process ends, even if
it crashes. Process ids are not used: a container reuses them, and another machine has different ones.
"""

from __future__ import annotations

import glob
import itertools
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK = ".lock"


class Held:
    """A folder that only this process uses, until `release`, `remove`, or the end of the process."""

    def __init__(self, folder: Path, lock: BaseFileLock | None) -> None:
        self.folder, self._lock = folder, lock

    def release(self) -> None:
        """Let other processes take the folder, with its content."""
        if self._lock is not None:
            self._lock.release(force=True)

    def remove(self) -> None:
        """Delete the folder."""
        if os.name == "nt":  # Windows cannot delete an open file
            self.release()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()


def hold(folder: Path) -> Held | None:
    """Take ownership of the folder, which is created if missing. None while another process owns it.

    On a file system without locks, only the process that created a folder owns it, and no later one can.
    """
    while True:
        try:
            folder.mkdir(parents=True)
            fresh = True
        except FileExistsError:
            fresh = False
        lock = FileLock(folder / LOCK, thread_local=False)
        try:
            lock.acquire(blocking=False)
            return Held(folder, lock)
        except (Timeout, PermissionError):  # owned by another process or another user
            return None
        except FileNotFoundError:  # its owner has just removed it
            continue
        except (OSError, NotImplementedError):  # a file system without locks
            return Held(folder, None) if fresh else None


@contextmanager
def alone(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Run the block while no other process is in `alone` for that folder; wait for one that is.

    `waiting` is called before a wait. On a file system without locks it does not wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, thread_local=False)
    with suppress(OSError, NotImplementedError):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waiting()
            lock.acquire()
    try:
        yield
    finally:
        lock.release(force=True)


def scratch(prefix: Path) -> Held:
    """A new folder PREFIX-TOKEN. Folders with the same prefix that dead processes left behind are removed."""
    sweep(prefix)
    while True:  # another process's sweep may take the folder before it is locked
        if held := hold(prefix.with_name(f"{prefix.name}-{secrets.token_hex(4)}")):
            return held


def sweep(prefix: Path) -> None:
    """Remove the scratch folders of processes that have ended."""
    for left in left_behind(prefix):
        left.remove()


def left_behind(prefix: Path) -> list[Held]:
    """The scratch folders with that prefix that no running process owns. This process now owns them."""
    found = sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}-*"))
    return [held for folder in found if folder.is_dir() and (held := hold(folder)) is not None]


def resumable(place: Path) -> Held:
    """`place`, with the work that an interrupted process left there. PLACE-2, PLACE-3, ... while others own it.

    If several are free, this takes the one with the most entries and removes the others. A warning says that another
    process does the same work.
    """
    held = _resumed(place)
    if held.folder != place and place.exists():
        warnings.warn(
            f"another process does the same work, in {place}: this one does it too, in {held.folder.name}. "
            "Stop one of them to save the time",
            stacklevel=3,
        )
    return held


def _resumed(place: Path) -> Held:
    known = [place, *sorted(place.parent.glob(f"{glob.escape(place.name)}-*"))]
    free = [held for folder in known if folder.is_dir() and (held := hold(folder)) is not None]
    if free:
        best = max(free, key=lambda held: len(list(held.folder.iterdir())))
        for other in free:
            if other is not best:
                other.remove()
        return best
    for number in itertools.count(1):
        if held := hold(place if number == 1 else place.with_name(f"{place.name}-{number}")):
            return held
    raise AssertionError
