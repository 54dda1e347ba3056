"""Folders that fewbit makes once and keeps: where they lie, and how they come to be whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fewbit.errors import FormatError, OutputError, PlanError
from fewbit.system import locks
from fewbit.system.files import read_json

_SET = "Set FEWBIT_CACHE to a folder that can be written and has room."
SIZES = ".sizes.json"  # hidden: it is no part of what was made


def cache_folder() -> Path:
    """The folder under which everything is cached: $FEWBIT_CACHE, else $XDG_CACHE_HOME/fewbit, else ~/.cache/fewbit.

    It exists and can be written. Where that is not so, PlanError for $FEWBIT_CACHE, and for the others a folder among
    the system's temporary ones, after a warning.
    """
    if own := os.environ.get("FEWBIT_CACHE"):
        folder = Path(os.path.expanduser(own)).absolute()
        if reason := _why_not(folder):
            raise PlanError(f"FEWBIT_CACHE={own} cannot be written: {reason}", _SET)
        return folder
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(shared).absolute() if shared else Path.home() / ".cache") / "fewbit"
    except RuntimeError:  # no HOME, and a user that the system does not know
        return _temporary("this user has no home folder")
    reason = _why_not(folder)
    return folder if reason is None else _temporary(f"{folder} cannot be written ({reason})")


@cache
def _why_not(folder: Path) -> str | None:
    """None if files can be made in the folder, which is made, else a reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


@cache
def _temporary(why: str) -> Path:
    """A cache that the system may delete, this user's own."""
    user = os.getuid() if hasattr(os, "getuid") else None
    try:
        folder = Path(tempfile.gettempdir()) / f"fewbit-{user or 'cache'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        theirs = user is not None and folder.lstat().st_uid != user
        reason = f"{folder} belongs to another user" if theirs else _why_not(folder)
    except OSError as error:  # no temporary folder can be written either
        raise PlanError(f"there is no place for the cache: {why}; {error.strerror or error}", _SET) from None
    if reason:
        raise PlanError(f"there is no place for the cache: {why}; {reason}", _SET)
    warnings.warn(f"{why}: the cache is {folder}. Set FEWBIT_CACHE to choose another folder", stacklevel=3)
    return folder


def made(name: str, make: Callable[[Path], None], nbytes: int = 0) -> Path:
    """The whole folder `name` of the cache; `make(empty_folder)` fills it, with `nbytes`, if it is not there yet.

    It is filled under another name beside its place and renamed when all of it is on the disk, so that nobody, another
    process included, sees half of it. A folder that lacks a file or has one of another size than was written is made
    again. Whatever `make` raises passes through and leaves nothing behind, but for what cannot be written: OutputError.
    """
    place = cache_folder() / name
    if _whole(place):
        return place
    free = shutil.disk_usage(place.parent).free
    if free < nbytes:
        raise PlanError(
            f"{nbytes / 1e6:,.0f} MB of disk are needed for the cache {place.parent}, {free / 1e6:,.0f} MB are free",
            _SET,
        )
    held = locks.scratch(place.with_name(f".{name}"))
    try:
        staging = held.folder / "new"
        staging.mkdir()
        make(staging)
        sizes = {path.name: path.stat().st_size for path in staging.iterdir()}
        (staging / SIZES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
        for path in (*staging.iterdir(), staging):
            _sync(path)
        _put(staging, place)
    except OSError as error:
        raise OutputError(f"the cache {place.parent} cannot be written: {error.strerror or error}", _SET) from error
    finally:
        held.remove()
    return place


def _whole(place: Path) -> bool:
    try:
        sizes: dict[str, int] = read_json(place / SIZES)
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, FormatError, AttributeError, TypeError):
        return False


def _put(staging: Path, place: Path) -> None:
    """`place` is whole afterwards: our folder, or that of a process that was faster."""
    if place.exists() and not _whole(place):
        place.rename(staging.with_name("broken"))  # goes with the folder that both are in
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
