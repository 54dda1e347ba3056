"""Folders that fewbit makes once and keeps: where they lie, and how they come to be whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

SIZES = ".sizes.json"  # hidden: it is no part of what was made


def cache_folder() -> Path:
    """The folder under which everything is cached: $FEWBIT_CACHE, else $XDG_CACHE_HOME/fewbit, else ~/.cache/fewbit."""
    if own := os.environ.get("FEWBIT_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).absolute() if shared else Path.home() / ".cache") / "fewbit"


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The whole folder `name` of the cache; `make(empty_folder)` fills it if it is not there yet.

    It is filled under another name beside its place and renamed when all of it is on the disk, so that nobody, another
    process included, sees half of it. A folder that lacks a file or has one of another size than was written is made
    again. Whatever `make` raises passes through and leaves nothing behind.
    """
    place = cache_folder() / name
    if _whole(place):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f".{name}.{secrets.token_hex(6)}")
    staging.mkdir()
    try:
        make(staging)
        sizes = {path.name: path.stat().st_size for path in staging.iterdir()}
        (staging / SIZES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
        for path in (*staging.iterdir(), staging):
            _sync(path)
        _put(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return place


def _whole(place: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((place / SIZES).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _put(staging: Path, place: Path) -> None:
    """`place` is whole afterwards: our folder, or that of a process that was faster."""
    if place.exists() and not _whole(place):
        broken = place.with_name(f"{staging.name}.broken")
        place.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        staging.rename(place)
        _sync(place.parent)
    except OSError:
        if not _whole(place):
            raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
