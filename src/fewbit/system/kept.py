"""What the cache folder keeps: each entry with its model, kind, size and age; and how an entry is deleted.

What makes an entry says by `label` which model it belongs to, because the names of entries are digests.

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

from fewbit.errors import FormatError
from fewbit.system import locks
from fewbit.system.cache import cache_folder
from fewbit.system.files import read_json, write_json

_LABEL = ".about.json"  # hidden: it is not part of the content
ABANDONED = 30 * 86400  # age in seconds from which an unfinished run counts as abandoned


@dataclass(frozen=True)
class Entry:
    """One thing that the cache keeps.

    kind: `runs` (unfinished runs of quantize and tune), `models` (converted pickles and the demo model), `comparisons`
    (rows of compare, with their models), `costs` (of weights at each width), `kernels` (the fastest sizes on a GPU),
    `temporary` (working folders) or `rescued` (results that could not be written to their place). nbytes: bytes in its
    files. age: seconds since one of its files was last written. in_use: a running process holds it. model: the model
    that it belongs to, as the user named it; of `kernels` the GPU. holds: what it has of the model. Both are empty for
    entries of fewbit 0.2 and before.
    """

    kind: str
    path: Path
    nbytes: int
    age: float
    in_use: bool
    model: str = ""
    holds: str = ""

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
    ("kernels", "kernels/*.json"),
    ("temporary", ".unpickled-*"),
    ("temporary", ".smollm2-*"),
    ("temporary", "on-load-*"),
    ("temporary", "merged-*"),
    ("temporary", "outputs/*"),
    ("rescued", "rescued-*"),
)
KINDS = tuple(dict.fromkeys(kind for kind, _ in _FOUND))


def label(place: Path, model: str, holds: str) -> None:
    """Say which model the entry `place`, a folder or a file, belongs to, and what it holds, for `fewbit cache`.

    If it cannot be written, the entry is shown by its own name: the work itself says what is wrong with the disk.
    """
    with suppress(OSError):
        write_json(_label_of(place), {"model": model, "holds": holds})


def _label_of(place: Path) -> Path:
    return place / _LABEL if place.is_dir() else place.with_name(f".{place.name}{_LABEL}")


def entries() -> list[Entry]:
    """All entries of the cache, by kind, the oldest first."""
    base, now = cache_folder(), time.time()
    places = ((kind, path) for kind, pattern in _FOUND for path in base.glob(pattern))
    found = (_entry(kind, path, now) for kind, path in places if not path.name.endswith(_LABEL))
    return sorted(filter(None, found), key=lambda each: (KINDS.index(each.kind), -each.age))


def delete(entry: Entry) -> bool:
    """Delete an entry. False if a running process uses it; then nothing is deleted.

    OSError if a file cannot be deleted.
    """
    if entry.path.is_symlink() or entry.path.is_file():
        entry.path.unlink(missing_ok=True)
        _label_of(entry.path).unlink(missing_ok=True)
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


def _entry(kind: str, path: Path, now: float) -> Entry | None:
    """None if another process has just deleted it."""
    try:
        stats = list(_stats(path)) or [path.lstat()]
    except FileNotFoundError:
        return None
    newest = max(stat.st_mtime for stat in stats)
    nbytes = sum(stat.st_size for stat in stats if stat_module.S_ISREG(stat.st_mode))
    return Entry(kind, path, nbytes, max(0.0, now - newest), _in_use(path), *_labelled(path))


def _labelled(path: Path) -> tuple[str, str]:
    """The model and the content that `label` wrote; empty without."""
    try:
        found = read_json(_label_of(path))
        return str(found["model"]), str(found["holds"])
    except (OSError, FormatError, KeyError, TypeError):
        return "", ""


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of all files under a folder. A link is not followed. Looking at an entry writes its lock, so that is left out,
    and so is its label."""
    if path.is_symlink() or not path.is_dir():
        return
    for folder, _, names in os.walk(path):
        for name in set(names) - {locks.LOCK, _LABEL}:
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
