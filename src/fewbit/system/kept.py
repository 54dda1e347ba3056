"""What the cache folder keeps: each entry with its kind, size and age; and how an entry is deleted.

Only names that fewbit itself makes are entries. Other files in the folder are neither listed nor deleted.
"""

from __future__ import annotations

import os
import shutil
import stat as stat_module
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fewbit.system import locks
from fewbit.system.cache import cache_folder

ABANDONED = 30 * 86400  # age in seconds from which an unfinished run counts as abandoned


@dataclass(frozen=True)
class Entry:
    """One thing that the cache keeps.

    kind: `runs` (unfinished runs of quantize and tune), `models` (converted pickles and the demo model), `comparisons`
    (rows of compare, with their models), `costs` (of weights at each width), `temporary` (working folders) or `rescued`
    (results that could not be written to their place). nbytes: bytes in its files. age: seconds since one of its files
    was last written. in_use: a running process holds it.
    """

    kind: str
    path: Path
    nbytes: int
    age: float
    in_use: bool

    @property
    def abandoned(self) -> bool:
        """Whether it is a run that nobody has continued for a month."""
        return self.kind == "runs" and not self.in_use and self.age > ABANDONED


_FOUND: tuple[tuple[str, str], ...] = (
    ("runs", "runs/*"),
    ("runs", "tuning/*"),
    ("models", "unpickled-*"),
    ("models", "smollm2-*"),
    ("comparisons", "compare/*"),
    ("costs", "costs/*"),
    ("temporary", ".unpickled-*"),
    ("temporary", ".smollm2-*"),
    ("temporary", "on-load-*"),
    ("temporary", "merged-*"),
    ("temporary", "outputs/*"),
    ("rescued", "rescued-*"),
)
KINDS = tuple(dict.fromkeys(kind for kind, _ in _FOUND))


def entries() -> list[Entry]:
    """All entries of the cache, by kind, the oldest first."""
    base, now = cache_folder(), time.time()
    found = [_entry(kind, path, now) for kind, pattern in _FOUND for path in base.glob(pattern)]
    return sorted(found, key=lambda each: (KINDS.index(each.kind), -each.age))


def delete(entry: Entry) -> bool:
    """Delete an entry. False if a running process uses it; then nothing is deleted.

    OSError if a file cannot be deleted.
    """
    if entry.path.is_symlink() or entry.path.is_file():
        entry.path.unlink(missing_ok=True)
        return True
    held = locks.hold(entry.path) if _lockable(entry.path) else None
    if held is None and _lockable(entry.path):
        return False
    try:
        with suppress(FileNotFoundError):  # another process has deleted it
            shutil.rmtree(entry.path)
    finally:
        if held is not None:
            held.release()
    return True


def _entry(kind: str, path: Path, now: float) -> Entry:
    stats = list(_stats(path)) or [path.lstat()]
    newest = max(stat.st_mtime for stat in stats)
    nbytes = sum(stat.st_size for stat in stats if stat_module.S_ISREG(stat.st_mode))
    return Entry(kind, path, nbytes, max(0.0, now - newest), _in_use(path))


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of all files under a folder. A link is not followed. Looking at an entry writes its lock, so that is left out."""
    if path.is_symlink() or not path.is_dir():
        return
    for folder, _, names in os.walk(path):
        for name in set(names) - {locks.LOCK}:
            with suppress(FileNotFoundError):  # another process has just deleted it
                yield (Path(folder) / name).lstat()


def _lockable(path: Path) -> bool:
    return (path / locks.LOCK).exists()


def _in_use(path: Path) -> bool:
    if not _lockable(path):
        return False
    held = locks.hold(path)
    if held is not None:
        held.release()
    return held is None
