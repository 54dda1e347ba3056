"""The output of a command, a folder or a single file: checked before any work, and published atomically after it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fewbit.errors import FewbitError, FormatError, OutputError, PlanError
from fewbit.system import kept, locks
from fewbit.system.cache import cache_folder
from fewbit.system.files import read_json

RECORD = "fewbit.json"
ANOTHER = "Give another `out`."
_ROOM = "Free some space, give another `out`, or set FEWBIT_CACHE to a folder on another disk."
_UNITS = ((10**9, "GB"), (10**6, "MB"), (1000, "kB"), (1, "bytes"))
# File names that transformers, PEFT and fewbit write into the folder of a model, an adapter or a report.
_OURS = re.compile(
    r"""
    (adapter_)?config\.json | generation_config\.json | fewbit\.(json|scales) | quant(ize)?_config\.json
    | (model|adapter_model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)? | model\.gguf | training_args\.bin
    | tokenizer(_config)?\.(json|model) | special_tokens_map\.json | added_tokens\.json | vocab\.(json|txt)
    | merges\.txt
    | spiece\.model | sentencepiece\.bpe\.model | chat_template\.(json|jinja)
    | (video_|image_)?(pre)?processor_config\.json
    | (configuration|modeling|tokenization|processing|image_processing)_\w+\.py
    | \.(fewbit\.json|README\.md)\.[0-9a-f]{8}\.part  # of a record whose writing was killed
    | README(-original)?\.md | LICENSE[\w.-]* | NOTICE[\w.-]* | \.gitattributes | \.lock
    | report\.json | index\.html | quality-(size|speed)\.(svg|png)
    """,
    re.VERBOSE,
)


def check_output(out: str | Path, *, overwrite: bool, file: bool | None = None) -> Path:
    """`out` as a path where a folder (with `file`: a file) can be created; PlanError if it is taken or not creatable.

    file: None if it is not known yet which of them it will be.
    It tries now what must work later: it creates and removes a folder next to `out` and, if it is free, `out` itself.
    Inside `claims`, no other process can make `out` from now on; PlanError if one does already.
    """
    place = named(out)
    with _as_plan_error(out):
        _check_link(place)
        check_free(place, overwrite=overwrite)
        if file is not None and (place.is_dir() if file else place.is_file()):
            raise PlanError(f"{out} is a {'folder, not a file' if file else 'file, not a folder'}", ANOTHER)
        real = place.resolve()
        if place.exists():
            _check_replaceable(out, real)
        _check_creatable(real)
    _claim(real)
    return place


def check_free(out: str | Path, *, overwrite: bool) -> None:
    """PlanError if `out` exists and must not be replaced, or if no file can have its name. An empty folder is free."""
    with _as_plan_error(out):
        if not overwrite and _is_taken(Path(out)):
            raise PlanError(f"{out} exists", "Use `overwrite=True` to replace it, or give another `out`.")


def check_folder(out: str | Path, made: str, instead: str = "") -> None:
    """PlanError if a folder would have the name of a GGUF file. made: what makes it. instead: how to make a file."""
    if Path(out).suffix == ".gguf":
        raise PlanError(f"{out} would be a GGUF file, and {made}", f"{ANOTHER} {instead}".strip())


def _is_taken(place: Path) -> bool:
    """Whether there is anything but an empty folder. `check_output` of another process may make and remove that now."""
    try:
        return next(place.iterdir(), None) is not None
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        if os.path.lexists(place):
            return True
        raise  # a parent is a file


def named(out: str | Path) -> Path:
    """`out` as a path. PlanError if it is empty, or if it is or contains the current folder."""
    if not str(out).strip():
        raise PlanError("the output has an empty name", "Give the folder or file to create: `out=OUT`.")
    try:
        inside = Path.cwd().is_relative_to(Path(out).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of symbolic links, a name with a null byte
        raise PlanError(f"{out} cannot be created: {_reason(error)}", ANOTHER) from None
    if inside:
        raise PlanError(f"{out} is the current folder or contains it, and cannot be replaced", ANOTHER)
    return Path(out)


def check_writable(folder: str | Path) -> Path:
    """`folder` as a path to write files into. It may exist. PlanError if files cannot be created in it."""
    if not str(folder).strip():
        raise PlanError("the output has an empty name", "Give a folder: `out=OUT`.")
    place = Path(folder)
    with _as_plan_error(folder):
        _check_link(place)
        if place.is_file():
            raise PlanError(f"{folder} is a file, not a folder", ANOTHER)
        _check_creatable(place.resolve() / "any")
    return place


def check_not_lost(out: Path, *needed: str | Path) -> None:
    """PlanError if replacing `out` would delete one of the `needed` paths."""
    for place in needed:
        if Path(place).resolve().is_relative_to(out.resolve()):
            what = "is an input of this command" if Path(place).resolve() == out.resolve() else f"contains {place}"
            raise PlanError(f"{out} {what}, which would be lost", ANOTHER)


# What the running verb has claimed: the claims, which end with it, and their paths.
_claims: ContextVar[tuple[ExitStack, set[Path]] | None] = ContextVar("claims", default=None)


@contextmanager
def claims() -> Iterator[None]:
    """Keep what `check_output` claims until the block ends. Inside of another such block: until that one ends."""
    if _claims.get() is not None:
        yield
        return
    with ExitStack() as stack:
        token = _claims.set((stack, set()))
        try:
            yield
        finally:
            _claims.reset(token)


def _claim(out: Path) -> None:
    if (held := _claims.get()) is not None and out not in held[1]:
        held[0].enter_context(claimed(out))
        held[1].add(out)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Run the block while no other process of this cache makes `out`. PlanError at once if one does."""
    place = cache_folder() / "outputs" / sha256(os.fsencode(out.resolve())).hexdigest()[:32]

    def taken() -> None:
        raise PlanError(f"another process is making {out}", "Wait until it has ended, or give another `out`.")

    with locks.alone(place, taken):
        kept.label(place, "", f"another process makes {out}")
        try:
            yield
        finally:
            shutil.rmtree(place, ignore_errors=True)


def existing(path: Path) -> Path:
    """The path, or its nearest parent folder that exists."""
    while not path.exists():
        path = path.parent
    return path


def check_space(needs: Mapping[Path, int], hint: str = _ROOM) -> None:
    """PlanError unless so many bytes are free at each place. Places on one disk need the sum."""
    disks: dict[int, list[Path]] = {}
    for place in needs:
        disks.setdefault(existing(place.absolute()).stat().st_dev, []).append(place)
    for places in disks.values():
        needed, free = sum(needs[place] for place in places), shutil.disk_usage(existing(places[0].absolute())).free
        if free < needed:
            where = " and ".join(map(str, places))
            raise PlanError(
                f"{_size(needed)} of disk are needed for {where}, {_size(free)} are free",
                hint,
            )


class Parts(NamedTuple):
    """How an output is split. split: replaces a file by its parts, and returns them. beside: the parts at its place."""

    split: Callable[[Path], list[Path]]
    beside: Callable[[Path], list[Path]]


@contextmanager
def published(
    out: Path,
    *,
    overwrite: bool = False,
    file: bool = False,
    kept: str = "",
    parts: Parts | None = None,
) -> Iterator[Path]:
    """Yield a new temporary folder. It is renamed to `out` when the block succeeds, and deleted when the block raises.

    With `file`, this yields a path in such a folder, and the file written there becomes `out`. `parts` may then split
    it: the parts take the place of `out` and of earlier parts. The first one, which makes the others known, comes last.
    If `out` is a symbolic link, its target is replaced. An empty folder at `out` gets the new content and keeps its
    permissions. OutputError if something cannot be written; its hint is `kept`, which says what work is not lost.
    """
    with as_output_error(out, kept):
        real = out.resolve()
        real.parent.mkdir(parents=True, exist_ok=True)
        for left in locks.left_behind(_beside(real)):
            if (left.folder / "old").exists() and not real.exists():
                (left.folder / "old").rename(real)  # an earlier run was killed between the two renames below
            left.remove()
        held = locks.scratch(_beside(real))
        staging, old = held.folder / "new", held.folder / "old"
        try:
            staging.mkdir()
            made = staging / real.name if file else staging
            yield made
            made_of = [made] if parts is None else parts.split(made)
            mode = staging.stat().st_mode & 0o666  # that of a new file, by the umask
            for path in [*staging.rglob("*"), staging]:
                if path.is_file():  # some writers make temporary files, which only their owner can read
                    with suppress(OSError):  # some file systems have no modes
                        path.chmod(mode)
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            before = [path for path in (real, *(parts.beside(real) if parts else ())) if path.exists()]
            for path in before:
                shown = out if path == real else path
                if not overwrite and _is_taken(path):
                    raise PlanError(
                        f"{shown} was created by another program meanwhile", "Use `overwrite=True` to replace it."
                    )
                _check_replaceable(shown, path)
            if parts is not None:
                for path in before:
                    path.unlink()
            if file:
                for path in reversed(made_of):
                    path.replace(real.with_name(path.name))
            elif _is_taken(real):
                real.rename(old)
                try:
                    staging.rename(real)
                except BaseException:
                    old.rename(real)
                    raise
            else:
                if real.exists():  # an empty folder, which the renaming replaces
                    staging.chmod(stat.S_IMODE(real.stat().st_mode))
                staging.rename(real)
        finally:
            held.remove()


def rescued(error: FewbitError, out: Path, write: Callable[[Path], None]) -> OutputError:
    """Save a result that cannot be written to `out` in the cache or temporary folder, and return the error to raise.

    The error says where the result is now. `write` writes the result to the path that it receives.
    """
    for parent in (cache_folder, lambda: Path(tempfile.gettempdir())):
        with suppress(OSError, FewbitError):
            place = parent() / f"rescued-{secrets.token_hex(4)}" / out.name
            try:
                place.parent.mkdir(parents=True)
                kept.label(place.parent, "", f"meant for {out}")
                write(place)
            except BaseException:
                shutil.rmtree(place.parent, ignore_errors=True)
                raise
            return OutputError(error.message, f"The result is not lost: it is in {place}.")
    return OutputError(error.message, "Saving it in the cache and the temporary folder failed too: the result is lost.")


def _check_link(place: Path) -> None:
    if os.path.lexists(place) and not place.exists():
        raise PlanError(f"{place} is a link to {os.readlink(place)}, which does not exist", ANOTHER)


@contextmanager
def as_output_error(out: Path, kept: str) -> Iterator[None]:
    """A context that writes `out`. OutputError, with `kept` as its hint, if it cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{out} could not be written: {_reason(error)}", kept) from error


@contextmanager
def _as_plan_error(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(out) else ""
        raise PlanError(f"{out} cannot be created: {_reason(error)}{where}", ANOTHER) from None


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _beside(real: Path) -> Path:
    """The name prefix of the hidden folders next to `real`. A long name is hashed, since the prefix makes it longer."""
    name = real.name if len(os.fsencode(real.name)) < 200 else sha256(os.fsencode(real.name)).hexdigest()[:32]
    return real.with_name(f".{name}.fewbit")


def _check_creatable(real: Path) -> None:
    """OSError unless a file or folder can be created at `real`. Nothing is left behind."""
    missing = []
    for parent in real.parents:
        if parent.exists():
            break
        missing.append(parent)
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            parent.mkdir()
            made.append(parent)
        probe = _beside(real)
        held = locks.scratch(probe.with_name(f"{probe.name}-try"))
        try:
            (held.folder / "file").write_bytes(b"1")
            if not real.exists():
                (held.folder / "new").mkdir()
                (held.folder / "new").rename(real)
                real.rmdir()
        finally:
            held.remove()
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # another process may have begun to use it
                parent.rmdir()


def _check_replaceable(out: str | Path, real: Path) -> None:
    """PlanError unless `real` may be replaced: it is writable, with files of fewbit, transformers and PEFT only."""
    if os.path.ismount(real):
        raise PlanError(f"{out} is a mount point and cannot be replaced", "Give a folder inside it: `out=OUT/NAME`.")
    shared = real.parent.stat()
    owners = (0, shared.st_uid, real.stat().st_uid)
    if real.is_dir() and not os.access(real, os.W_OK | os.X_OK):
        raise PlanError(f"{out} cannot be replaced: you have no write permission", ANOTHER)
    if shared.st_mode & stat.S_ISVTX and hasattr(os, "geteuid") and os.geteuid() not in owners:
        raise PlanError(f"{out} cannot be replaced: it belongs to another user", ANOTHER)
    if (foreign := _foreign(real)) is not None:
        what = f"{out} contains {foreign}" if real.is_dir() else f"{out} is not a GGUF file or importance matrix"
        raise PlanError(f"{what}: `overwrite=True` replaces only what fewbit or transformers wrote", ANOTHER)


def _foreign(real: Path) -> str | None:
    """The name of an entry at `real` that neither fewbit nor transformers nor PEFT writes; None if there is none."""
    if not real.is_dir():
        return None if _is_weights(real) else real.name
    recorded = _recorded(real)
    for entry in sorted(real.rglob("*")):
        name = entry.relative_to(real).as_posix()
        if name in recorded or "__pycache__" in entry.parts:
            continue
        if entry.is_dir() and not entry.is_symlink():
            if any(each.startswith(f"{name}/") for each in recorded):
                continue
            return f"{name}/"
        if entry.parent != real or not _OURS.fullmatch(entry.name):
            return name
    return None


def _recorded(folder: Path) -> set[str]:
    """The files listed in the record of the run that wrote the folder."""
    try:
        files = read_json(folder / RECORD)["files"]
        return {str(name) for name in files}
    except (OSError, FormatError, KeyError, TypeError):
        return set()


def _is_weights(file: Path) -> bool:
    """Whether a file is a GGUF file, an importance matrix in the older (.dat) format, or empty."""
    with open(file, "rb") as stream:
        head = stream.read(264)
    if not head or head[:4] == b"GGUF":
        return True
    if len(head) < 16 or file.suffix != ".dat":
        return False
    entries, length = struct.unpack("<ii", head[:8])
    return 0 < entries < 1 << 20 and 0 < length <= 256 and head[8 : 8 + length].isascii()


def _size(nbytes: int) -> str:
    unit, name = next((scale, name) for scale, name in _UNITS if nbytes >= scale or scale == 1)
    return f"{float(f'{nbytes / unit:.3g}'):,g} {name}"
