"""The folder, or the one file, that a verb makes: checked before any work, there whole or not at all after it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbit.errors import PlanError


def claimed(out: str | Path, *, overwrite: bool, file: bool = False) -> Path:
    """`out` as a place where a folder, or a `file`, can be made; PlanError if it is taken or can be none."""
    out = Path(out)
    if out.exists() and not overwrite:
        raise PlanError(f"{out} exists", "Use --overwrite to replace it, or another -o.")
    if out.is_dir() if file else out.is_file():
        raise PlanError(f"{out} is a {'folder, not a file' if file else 'file, not a folder'}", "Give another -o.")
    if not existing(out.parent).is_dir():
        raise PlanError(f"{out} cannot be made: {existing(out.parent)} is a file")
    return out


def spare(out: Path, *needed: str | Path) -> None:
    """PlanError if replacing `out` would delete what is still needed."""
    for place in needed:
        if Path(place).expanduser().resolve().is_relative_to(out.resolve()):
            raise PlanError(f"{out} holds {place}, which would be lost", "Give another -o.")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def published(out: Path, *, overwrite: bool = False, file: bool = False) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the body ends, and vanishes if it does not.

    With `file`, what becomes `out` is the path in such a folder that is given.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.fewbit-*"):
        kind, pid = stale.name.removeprefix(f".{out.name}.fewbit-").split("-")[:2]
        if kind == "old" and not out.exists():
            stale.rename(out)  # a run died between the two renames below
        elif not _alive(pid):
            shutil.rmtree(stale, ignore_errors=True)
    own = f"{os.getpid()}-{secrets.token_hex(4)}"  # in a container the same number may come again
    staging, old = (out.parent / f".{out.name}.fewbit-{kind}-{own}" for kind in ("new", "old"))
    staging.mkdir()
    made = staging / out.name if file else staging
    try:
        yield made
        for path in [*staging.iterdir(), staging]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if out.exists() and not overwrite:
            raise PlanError(f"{out} has appeared meanwhile", "Use --overwrite to replace it.")
        if file:
            made.replace(out)
        elif out.exists():
            out.rename(old)
            try:
                staging.rename(out)
            except BaseException:
                old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
