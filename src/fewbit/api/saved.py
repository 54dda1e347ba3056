"""The record and the model card of a model that transformers' `save_pretrained` or `push_to_hub` writes.

A loaded model can be trained, merged or rounded before it is saved. So what was saved is compared with the model that
it was loaded from. If all tensors and the config are the same, the record is kept. If not, what was measured does not
hold: the new record has none of it, and keeps the old one in `original`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, hf_hub_download, metadata_load
from torch import Tensor

from fewbit.api import records, shared
from fewbit.errors import FewbitError
from fewbit.formats.containers.gguf import SAVED, GgufFile
from fewbit.formats.containers.safetensors import CARD, ORIGINAL_CARD, Checkpoint
from fewbit.models import scales
from fewbit.models.describe import describe
from fewbit.models.provenance import provenance
from fewbit.models.source import Source, locate
from fewbit.pipeline import replacing
from fewbit.report.card import last_part, model_card, portable
from fewbit.system import publish
from fewbit.system.files import read_json, write_text

# Keys of a config that say nothing of what the model computes, or that saving changes.
_BESIDE = {"_name_or_path", "architectures", "dtype", "fewbit_scales", "quantization_config", "torch_dtype"}
_BESIDE |= {"transformers_version", "use_cache"}
_TEMPLATE = "This model card has been automatically generated."  # in the card that transformers makes
_MAY = "It may differ from {}, whose files it replaced. What was measured of them is not repeated here."
_DIFFERS = "Weights or settings differ from those of {}. What was measured of that model does not hold for this one."
_UNRECORDED = "It was saved from {}, and how that was made is not recorded."
_MEND = "Repair or delete this file, and push again."
_ON_LOAD = "The weights were quantized by {} when {} was loaded."


@contextmanager
def described(model: Any, folder: Path, origin: Path) -> Iterator[None]:
    """A context that saves `model` to `folder`. After it, the folder has a card, and a record if `origin` has one.

    origin: the folder or GGUF file that the model was loaded from. A card that somebody wrote or edited stays, with a
    warning. A warning also says why a folder gets no card.
    """
    known, file = _read(origin), _file(model)
    replaced, theirs = folder.resolve() == origin.resolve(), not _is_own(folder, file)
    yield
    with _as_warning(folder):
        record, place = _recorded(model, locate(folder / file), origin, known, replaced), folder / CARD
        card = model_card(record, file=file)
        if theirs and place.read_text(encoding="utf-8") != card:
            warnings.warn(f"{folder}: {records.EDITED}", stacklevel=4)
        else:
            write_text(place, card)
        shared.cut_paths(locate(folder / file))


def describe_upload(model: Any, folder: Path, origin: Path, repo: str, token: Any) -> None:
    """Put the record and the card of a saved model into `folder`, whose files are uploaded next.

    transformers has put a card there: that of the repository, or a template. A card in the repository that fewbit did
    not write, or that somebody edited, stays. FewbitError if the model cannot be described: its files may then have
    paths of this machine, so nothing is uploaded.
    """
    try:
        known, file, place = _read(origin), _file(model), folder / CARD
        record = _recorded(model, locate(folder / file), origin, known, folder.resolve() == origin.resolve())
        there = place.read_text(encoding="utf-8") if place.is_file() else _TEMPLATE
        tags = (metadata_load(place) or {}).get("tags") if place.is_file() else None
        if _TEMPLATE in there or _body(there) == _body(_card_of(repo, token)):
            card: Any = ModelCard(model_card(record, repo, file))
            card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *(tags or ())]))
            write_text(place, str(card))
        shared.cut_paths(locate(folder / file))
    except FewbitError as error:
        message = f"nothing was uploaded to {repo}: the model cannot be described: {error.message}"
        raise type(error)(message, error.hint or _MEND) from error


@contextmanager
def _as_warning(folder: Path) -> Iterator[None]:
    """The model is saved already, so an error of its description is a warning."""
    try:
        yield
    except FewbitError as error:
        said = f"{folder}: the model is saved, but without a model card, and its files may have paths of this machine"
        warnings.warn(f"{said}: {error.message}", stacklevel=5)


def _read(origin: Path) -> tuple[Source, dict[str, Any]] | None:
    """The model that was loaded, and its record. None if its files are no longer there."""
    try:
        source = locate(origin)
        return source, describe(source).made
    except FewbitError:
        return None


def _file(model: Any) -> str:
    """The name of the file that `save_pretrained` writes if the model came from a GGUF file; else ""."""
    return SAVED if isinstance(getattr(model.hf_quantizer, "file", None), GgufFile) else ""


def _is_own(folder: Path, file: str) -> bool:
    """Whether `folder` has no card, or one that fewbit wrote and that nobody has edited."""
    if not (folder / CARD).is_file():
        return True
    there = (folder / CARD).read_text(encoding="utf-8")
    try:
        source = locate(folder / file)
        record = describe(source).made or records.bare(source)
        return _body(there) == _body(model_card(record, file=file))
    except FewbitError:
        return False


def _body(card: str) -> str:
    """A card without its metadata, to which transformers adds tags."""
    return card.removeprefix("---\n").partition("\n---\n")[2].strip()


def _card_of(repo: str, token: Any) -> str:
    """The card that fewbit would write for the record in a repository; "" if it has none."""
    try:
        file = hf_hub_download(repo, publish.RECORD, token=token)
        return model_card(read_json(Path(file)), repo)
    except Exception:  # of the connection, or a file of this name that is another's
        return ""


def _recorded(
    model: Any, saved: Source, origin: Path, known: tuple[Source, dict[str, Any]] | None, replaced: bool
) -> dict[str, Any]:
    """The record of what was saved. It is written if the original has one; else only the card is made from it."""
    name = last_part(str(getattr(model, "name_or_path", "") or origin.name))
    source, before = known or (None, {})
    on_load = getattr(model.hf_quantizer, "request", None) or getattr(model.hf_quantizer, "scheme", None)
    if on_load or not before:
        record = records.bare(saved)
        base = {"base": provenance(source)} if source is not None else {}
        config = type(model.hf_quantizer.quantization_config).__name__
        said = _ON_LOAD.format(config, name) if on_load else _UNRECORDED.format(name)
        if not on_load and base:
            base["base"]["model"] = None  # it is not the original of this quantization
        return record | base | {"model": name, "notes": [said]}
    if not replaced and source is not None and _same(model, saved, source):
        record = dict(before)
    else:
        original = before.get("original", before)
        kept = {key: original[key] for key in ("model", "versions", "plan", "calibration", "base") if key in original}
        said = (_MAY if replaced else _DIFFERS).format(name)
        record = records.bare(saved) | kept | {"recorded": True, "notes": [said], "original": original}
    record = dict(portable(record))
    if saved.gguf is not None:
        _into_gguf(saved, record, before)
    else:
        _into_folder(saved.folder, source, record)
    return record


def _into_gguf(saved: Source, record: dict[str, Any], before: dict[str, Any]) -> None:
    """`before`: the record that is in the file."""
    if record != before:
        with publish.published(saved.files[0], overwrite=True, file=True) as place:
            file = GgufFile(saved.files[0])
            replacing.with_metadata(file, place, {scales.GGUF_RECORD: json.dumps(record)})


def _into_folder(folder: Path, source: Source | None, record: dict[str, Any]) -> None:
    card = None if source is None else source.beside / ORIGINAL_CARD
    if card is not None and card.is_file() and not (folder / ORIGINAL_CARD).exists():
        write_text(folder / ORIGINAL_CARD, card.read_text(encoding="utf-8"))
    if record.get("scales"):  # their file is not saved
        del record["scales"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    record["files"] = sorted({*names, CARD, publish.RECORD})
    write_text(folder / publish.RECORD, json.dumps(record, indent=1) + "\n")


def _same(model: Any, saved: Source, source: Source) -> bool:
    """Whether two models have the same tensors, by value, and configs that compute the same."""
    if saved.gguf is not None:
        if source.gguf is None:
            return False
        ours, theirs = GgufFile(saved.files[0]), GgufFile(source.files[0])
        return ours.entries.keys() == theirs.entries.keys() and all(
            _equal(ours.get(name), theirs.get(name)) for name in ours.entries
        )
    read = type(model.config).from_pretrained
    if _settings(read(saved.folder).to_dict()) != _settings(read(source.folder).to_dict()):
        return False
    here, there = Checkpoint(list(saved.files)), Checkpoint(list(source.files))
    return here.specs.keys() == there.specs.keys() and all(
        _equal(here.get(name), there.get(name)) for name in here.specs
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers, in any float dtype that holds them."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return a.is_floating_point() and b.is_floating_point() and torch.equal(a.double(), b.double())


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that decide what the model computes, also of the configs inside it."""
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _BESIDE and value is not None
    }
