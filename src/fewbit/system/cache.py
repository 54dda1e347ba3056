"""The cache: where its folders are, and how each is created atomically (complete or not at all)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from fewbit.errors import FormatError, OutputError, PlanError
from fewbit.names import expanded
from fewbit.system import locks
from fewbit.system.files import read_json

_SET = "Set FEWBIT_CACHE to a writable folder with enough space."
SIZES = ".sizes.json"  # hidden: it is not part of the content


def cache_folder() -> Path:
    """The cache folder: $FEWBIT_CACHE, else $XDG_CACHE_HOME/fewbit, else ~/.cache/fewbit.

    The returned folder exists and is writable. If $FEWBIT_CACHE is not writable, this raises PlanError. If one of the
    other two is not writable, this warns and returns a folder in the system's temporary directory.
    """
    if own := os.environ.get("FEWBIT_CACHE"):
        folder = Path(expanded(own)).absolute()
        if reason := _why_not(folder):
            raise PlanError(f"FEWBIT_CACHE={own} is not writable: {reason}", _SET)
        return folder
    if (usual := _usual()) is None:
        return _temporary("this user has no home folder")
    reason = _why_not(usual)
    return usual if reason is None else _temporary(f"{usual} is not writable ({reason})")


def existing(name: str) -> Path | None:
    """The entry `name` of the cache, None without one. This creates nothing, and takes a cache that is not writable."""
    if own := os.environ.get("FEWBIT_CACHE"):
        places = [Path(expanded(own)).absolute() / name]
    else:
        usual, spare = _usual(), _spare()
        places = [usual / name] if usual is not None else []
        places += [spare / name] if spare.is_dir() and not _of_another(spare) else []
    return next((place for place in places if place.exists()), None)


def _usual() -> Path | None:
    """The cache folder if $FEWBIT_CACHE is not set; None for a user without a home folder."""
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared).absolute() if shared else Path.home() / ".cache") / "fewbit"
    except RuntimeError:  # HOME is not set and the user is not in the system's user database
        return None


def _spare() -> Path:
    """A cache folder for this user in the temporary directory."""
    user = os.getuid() if hasattr(os, "getuid") else None
    return Path(tempfile.gettempdir()) / f"fewbit-{user or 'cache'}"


def _of_another(folder: Path) -> bool:
    """Whether a folder belongs to another user."""
    return hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid()


@cache
def _why_not(folder: Path) -> str | None:
    """Create the folder if needed. None if files can be created in it, else the reason why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


@cache
def _temporary(why: str) -> Path:
    """A cache folder for this user in the temporary directory, which the system may delete at any time."""
    try:
        folder = _spare()
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = f"{folder} belongs to another user" if _of_another(folder) else _why_not(folder)
    except OSError as error:  # the temporary directory is not writable either
        raise PlanError(f"there is no place for the cache: {why}; {error.strerror or error}", _SET) from None
    if reason:
        raise PlanError(f"there is no place for the cache: {why}; {reason}", _SET)
    warnings.warn(f"{why}: the cache is {folder}. Set FEWBIT_CACHE to choose another folder", stacklevel=3)
    return folder


def made(name: str, make: Callable[[Path], None], nbytes: int = 0) -> Path:
    """The complete cache folder `name`. If it does not exist yet, `make(empty_folder)` writes about `nbytes` into it.

    The folder is filled under a temporary name next to its final one, and renamed once all files are on disk. So no
    process ever sees it half written. A folder in which a file is missing or has a different size than recorded is
    made again.

    PlanError if the disk has less than `nbytes` free. OutputError if the cache cannot be written. Other exceptions
    from `make` are passed on. Nothing is left behind after an error.
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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A context that writes state or results to a folder of the cache. OutputError if they cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to the cache {folder}: {error.strerror or error}",
            "Free some space; the same command resumes where it stopped. Or set FEWBIT_CACHE to another folder.",
        ) from error


def _whole(place: Path) -> bool:
    try:
        sizes: dict[str, int] = read_json(place / SIZES)
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, FormatError, AttributeError, TypeError):
        return False


def _put(staging: Path, place: Path) -> None:
    """Rename `staging` to `place`. If another process was faster, its complete folder is kept."""
    if place.exists() and not _whole(place):
        place.rename(staging.with_name("broken"))  # deleted together with the scratch folder that contains it
    try:
        staging.rename(place)
        _sync(place.parent)
    except OSError:
        if not _whole(place):
            raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder as a file
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
