"""Upload a model to a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, by its documentation
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from fewbit.api import records, requested, shared
from fewbit.api.arguments import checked
from fewbit.errors import FewbitError, FormatError, OutputError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.gguf_strings import replace_strings
from fewbit.formats.containers.safetensors import (
    CARD,
    INDEX,
    ORIGINAL_CARD,
    folders_left_out,
    other_weights,
    replace_metadata,
    side_files,
)
from fewbit.models.calls import first_line
from fewbit.models.describe import describe
from fewbit.models.scales import FILE as SCALES
from fewbit.models.source import Source, locate
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS
from fewbit.report import progress as report_progress
from fewbit.report.card import model_card
from fewbit.report.results import Pushed
from fewbit.system import ambient, locks, publish
from fewbit.system.publish import RECORD


@dataclass(frozen=True)
class _Upload:
    """What is to be uploaded.

    name: of the model. files: name in the repository -> a local file, or the content. cuts: name -> what to do to a
    copy of a large file before it is uploaded. gguf: whether it is a GGUF file.
    """

    repo: str
    name: str
    files: dict[str, Path | bytes]
    notes: list[str]
    cuts: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    gguf: bool = False

    def sizes(self) -> dict[str, int]:
        return {
            name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in self.files.items()
        }


@checked
@ambient.defaults()
def push(
    model: str | Path,
    repo: str,
    *,
    public: bool = False,
    report: str | Path | None = None,
    revision: str | None = None,
    message: str | None = None,
    progress: bool | None = None,
) -> Pushed:
    """Upload `model` to the repository `repo` of the Hugging Face Hub, in one commit.

    model: a folder, a GGUF file or an adapter.
    The token is that of huggingface_hub (`hf auth login`, or the variable HF_TOKEN). A repository that does not exist
    is created, private unless `public`. The model card is the folder's; for a GGUF file, it is made from the record in
    it. report: folder of a comparison by `compare`, whose chart goes into the card. revision: the branch; it is created
    if needed. message: of the commit.
    PlanError before any upload if the model is incomplete, the name is wrong, there is no token, a file has a path of
    this machine that cannot be cut, or the repository exists and is public (private with `public`). OutputError if the
    upload fails; the same call then uploads what is missing.
    """
    upload = _prepared(model, repo, report)
    if constants.HF_HUB_OFFLINE:
        raise PlanError("HF_HUB_OFFLINE is set, and an upload needs the Hub", "Unset it.")
    if get_token() is None:
        raise PlanError("there is no token for the Hub", "Log in by hf auth login, or set HF_TOKEN.")
    with _shown(repo, progress), _as_error(repo), _without_paths(upload) as upload:
        return _uploaded(upload, public, revision, message or f"Upload {upload.name} by fewbit")


def preview(model: str | Path, repo: str, *, report: str | Path | None = None) -> Pushed:
    """What `push` would upload, without the network (`--dry-run`)."""
    upload = _prepared(model, repo, report)
    return Pushed(upload.repo, "", upload.sizes(), upload.notes)


def _prepared(model: str | Path, repo: str, report: str | Path | None) -> _Upload:
    """The files to upload, all of them checked. PlanError or FormatError if something is missing."""
    requested.check_upload(model, report)
    path = Path(model).absolute()
    if (path / ADAPTER).is_file():
        upload = _of_adapter(path, repo)
    else:
        source = locate(path)
        record = describe(source).made
        made = _of_folder if source.gguf is None else _of_gguf
        upload = made(source, repo, record, requested.chart(report))
    own = shared.own_places(path)
    for name, each in upload.files.items():
        shared.check_nothing_private(name, each, own, get_token(), cut=name in upload.cuts)
    return upload


def _of_folder(source: Source, repo: str, record: dict[str, Any], chart: Path | None) -> _Upload:
    folder = source.origin
    if source.folder != folder:
        raise PlanError(
            f"{source.name} has its weights in a pickle, which can run code when it is loaded",
            "Save the model as safetensors first.",
        )
    missing = [name for name in record.get("files", ()) if name != CARD and not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"{source.name} is incomplete: {', '.join(missing[:5])} of its record {RECORD} are missing",
            "Make it again by the same command.",
        )
    names = [file.name for file in source.files]
    names += [name for name in (INDEX, SCALES, RECORD, CARD, ORIGINAL_CARD) if (folder / name).is_file()]
    names += [path.as_posix() for path in side_files(folder)]
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted({*names})}
    notes = [f"left out: {each.name}, which is no part of the model" for each in other_weights(folder)]
    notes += [f"left out: the folder {each.name}, which has weights of its own" for each in folders_left_out(folder)]
    cuts = _cut(folder, files, notes)
    made = record or records.bare(source)
    picture = _added(files, chart)
    own = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None
    if own is None or own == model_card(made):
        files[CARD] = model_card(made, repo, chart=picture).encode()
    elif picture:
        notes.append(f"{CARD} was edited, so it stays as it is; {picture} is uploaded beside it")
    return _Upload(repo, folder.name, dict(sorted(files.items())), notes, cuts)


def _of_adapter(folder: Path, repo: str) -> _Upload:
    names = [ADAPTER_WEIGHTS, *(name for name in (RECORD, CARD) if (folder / name).is_file())]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    files |= {path.as_posix(): folder / path for path in side_files(folder)}
    notes: list[str] = []
    cuts = _cut(folder, files, notes)
    return _Upload(repo, folder.name, dict(sorted(files.items())), notes, cuts)


def _cut(folder: Path, files: dict[str, Path | bytes], notes: list[str]) -> dict[str, Callable[[Path], None]]:
    """Cut the paths of this machine in `files`. The result is for the safetensors files, which need a copy."""
    texts = shared.cut_files(folder, list(files))
    files.update(texts)
    said = [name for name in texts if not name.endswith(".json")]
    notes += [f"of the paths of this machine in {name}, only the last part is uploaded" for name in said]
    cuts: dict[str, Callable[[Path], None]] = {}
    for name, file in files.items():
        if isinstance(file, Path) and (metadata := shared.cut_metadata(file, folder)) is not None:
            cuts[name] = partial(replace_metadata, metadata=metadata)
    return cuts


def _of_gguf(source: Source, repo: str, record: dict[str, Any], chart: Path | None) -> _Upload:
    files: dict[str, Path | bytes] = {file.name: file for file in source.files}
    picture = _added(files, chart)
    files[CARD] = model_card(record or records.bare(source), repo, source.files[0].name, picture).encode()
    notes, cuts = [], dict[str, Callable[[Path], None]]()
    for file in source.files:
        if keys := shared.cut_keys(GgufFile(file)):
            notes.append(f"of the paths of this machine in {file.name}, only the last part is uploaded")
            cuts[file.name] = partial(replace_strings, strings=keys)
    return _Upload(repo, source.origin.name, dict(sorted(files.items())), notes, cuts, gguf=True)


def _added(files: dict[str, Path | bytes], chart: Path | None) -> str:
    """The name of the chart in the repository, to which it is added; "" if there is none."""
    if chart is None:
        return ""
    files[chart.name] = chart
    return chart.name


@contextmanager
def _without_paths(upload: _Upload) -> Iterator[_Upload]:
    """The upload, with copies of the large files that have paths of this machine. PlanError without room for them."""
    files = dict(upload.files)
    with ExitStack() as stack:
        for name, cut in upload.cuts.items():
            file = files[name]
            assert isinstance(file, Path)
            parent = file.parent if os.access(file.parent, os.W_OK) else Path(tempfile.gettempdir())
            held = locks.scratch(parent / f".{file.name[:100]}.fewbit-push")
            stack.callback(held.remove)
            needed = {parent: file.stat().st_size}
            publish.check_space(needed, "The paths in the file are cut in a copy. Free some space.")
            copy = Path(shutil.copyfile(file, held.folder / file.name))
            cut(copy)
            files[name] = copy
        yield replace(upload, files=files)


def _uploaded(upload: _Upload, public: bool, revision: str | None, message: str) -> Pushed:
    api, repo, notes = HfApi(), upload.repo, list(upload.notes)
    files = dict(upload.files)
    try:
        there = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        api.create_repo(repo, private=not public)
        before = set[str]()
    else:
        if public == bool(there.private):
            kind, hint = ("private", "Omit `public`") if public else ("public", "Use `public=True` to upload there")
            raise PlanError(f"{repo} exists and is {kind}", f"{hint}, or give another name.")
        before = {each.rfilename for each in there.siblings or ()}
    if upload.gguf and CARD in before and any(name.endswith(".gguf") and name not in files for name in before):
        del files[CARD]
        notes.append(f"{repo} has other GGUF files, so its {CARD} stays as it is")
    stale = sorted(name for name in before - files.keys() if name.endswith((".safetensors", ".index.json")))
    if stale and not upload.gguf:
        notes.append(f"{repo} still has {', '.join(stale)}, which this model does not have")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    additions = [
        CommitOperationAdd(name, each if isinstance(each, bytes) else os.fspath(each)) for name, each in files.items()
    ]
    done = api.create_commit(repo, additions, commit_message=message, revision=revision)
    sizes = upload.sizes()
    return Pushed(repo, done.commit_url, {name: sizes[name] for name in files}, notes)


@contextmanager
def _shown(repo: str, progress: bool | None) -> Iterator[None]:
    """Show the upload: in a terminal by huggingface_hub's own bars, elsewhere by a line."""
    if progress is not False and sys.stderr.isatty():
        yield
        return
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with report_progress.phase(f"uploading to {repo}", progress):
            yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def _as_error(repo: str) -> Iterator[None]:
    try:
        yield
    except FewbitError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise PlanError(f"{repo}: the Hub does not accept the token", "Log in again by hf auth login.") from error
        if status == 403:
            raise PlanError(
                f"{repo}: the token may not write there: {first_line(error)}",
                "Use a token with write access, and a name of your own or of your organization.",
            ) from error
        raise OutputError(f"{repo}: the upload failed: {first_line(error)}", _AGAIN) from error
    except Exception as error:  # the connection, and what an upload by hf_xet raises
        said = [first_line(each) for each in (error, error.__cause__) if each is not None]
        why = f" ({said[1]})" if said[1:] and said[1] not in said[0] else ""
        raise OutputError(f"{repo}: the upload failed: {said[0]}{why}", _AGAIN) from error


_AGAIN = "The same command uploads what is missing."
