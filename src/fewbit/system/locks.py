"""Working folders that belong to one living process, on this machine or another that shares the disk.

A process holds a folder by a lock on a file in it. The kernel frees the lock when the process ends, however it ends, so
nothing here asks whether a process number is alive: a container gives the same numbers again, and another machine has
numbers of its own.
"""

from __future__ import annotations

import glob
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK = ".lock"


class Held:
    """A folder that this process alone works in, until `release` or `remove`, or the end of the process."""

    def __init__(self, folder: Path, lock: BaseFileLock | None) -> None:
        self.folder, self._lock = folder, lock

    def release(self) -> None:
        """Let others have the folder, with what is in it."""
        if self._lock is not None:
            self._lock.release(force=True)

    def remove(self) -> None:
        """Delete the folder."""
        if os.name == "nt":  # Windows deletes no file that is open
            self.release()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()


def hold(folder: Path) -> Held | None:
    """The folder, made if it is missing, as this process's own; None while another process has it.

    A file system may have no locks. There a folder belongs to the process that made it, and to no later one.
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
        except (Timeout, PermissionError):  # another process has it, or another user
            return None
        except FileNotFoundError:  # its holder has just removed it
            continue
        except (OSError, NotImplementedError):  # no locks here
            return Held(folder, None) if fresh else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other process is in `alone` for that folder; waits for one that is. Without locks it does not wait."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, thread_local=False)
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release(force=True)


def scratch(prefix: Path) -> Held:
    """A fresh folder PREFIX-TOKEN. Those of the same prefix that ended processes left behind are removed."""
    sweep(prefix)
    while True:  # who sweeps may take a folder before it is locked
        if held := hold(prefix.with_name(f"{prefix.name}-{secrets.token_hex(4)}")):
            return held


def sweep(prefix: Path) -> None:
    """Remove the scratch folders of ended processes."""
    for left in left_behind(prefix):
        left.remove()


def left_behind(prefix: Path) -> list[Held]:
    """The scratch folders of that prefix that no living process holds, now held by this one."""
    found = sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}-*"))
    return [held for folder in found if folder.is_dir() and (held := hold(folder)) is not None]


def resumable(place: Path) -> Held:
    """`place` with what an interrupted process left there; beside it, PLACE-2 ..., while other processes have it."""
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
