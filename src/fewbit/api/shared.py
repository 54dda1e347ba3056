"""What others get of a model has no paths of this machine: an upload, and what `save_pretrained` writes.

A record is cut by `portable`. In the other configs and in the metadata of a weight file, a value that is an absolute
path is replaced by the last part of that path; other programs write such values, for example `name_or_path`. In other
texts, such as a card, this is done to paths below the folders of this user and of the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.gguf_strings import Strings, replace_strings
from fewbit.formats.containers.safetensors import metadata_of
from fewbit.models.scales import FILE as SCALES
from fewbit.models.scales import GGUF_RECORD
from fewbit.models.source import Source
from fewbit.names import ADAPTER
from fewbit.report.card import last_part, portable
from fewbit.system.cache import cache_folder
from fewbit.system.publish import RECORD

_SAVED = (RECORD, "config.json", "generation_config.json")
# Vocabularies and templates: what looks like a path there is a token.
_TOKENS = {"tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json"}
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"}
_TOKENS_INSIDE = ("added_tokens_decoder", "chat_template", "extra_special_tokens")
_BEGINNING = 64 << 20  # bytes
_END = r"(?![\w-]|\.\w)"  # a place ends here, not in the middle of a name
_PARTS = r"(?:/[^\s/,;:'\"`()<>\[\]\\]+)*/?"


def own_places(model: Path) -> list[str]:
    """The folders whose paths say who the user is: home, the cache, the current one, the model, an adapter's base."""
    found = [Path(os.path.expanduser("~")), cache_folder(), Path.cwd(), model, model.parent]
    with suppress(OSError, ValueError, AttributeError):
        found.append(Path(json.loads((model / ADAPTER).read_bytes())["base_model_name_or_path"]))
    both = {str(each) for place in found for each in (place, place.resolve()) if place.is_absolute()}
    # /tmp or /root alone tells nothing, and others' texts have it too.
    return sorted((each for each in both if each.count("/") > 1), key=len, reverse=True)


def cut_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """File name -> its content without paths of this machine, of those texts among `names` that have such paths."""
    found, own = {}, _own(own_places(folder))
    for name in names:
        file = folder / name
        if file.name in _TOKENS | _VOCABULARIES or _is_weights(file):
            continue
        with suppress(OSError, UnicodeDecodeError):  # `check_nothing_private` reads what is no text
            text = file.read_bytes().decode()
            cut = _cut_json(text, own, file.name == RECORD) if name.endswith(".json") else own(text)
            if cut != text:
                found[file.relative_to(folder).as_posix()] = cut.encode()
    return found


def cut_metadata(file: Path, folder: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file without paths of this machine; None if it has no such paths."""
    if not _is_weights(file) or file.suffix == ".gguf":
        return None
    own, before = _own(own_places(folder)), metadata_of(file)
    cut = {key: _cut_text(value, own) for key, value in before.items()}
    return None if cut == before else cut


def cut_keys(file: GgufFile) -> dict[str, tuple[str, str]]:
    """Key -> its value and the value without paths of this machine, of the keys of a GGUF file that have such paths."""
    found, own = {}, _own(own_places(file.path))
    for key, value in file.metadata.items():
        if not isinstance(value, str) or key.startswith("tokenizer."):
            continue
        cut = _record(value) if key == GGUF_RECORD else own(last_part(value))
        if cut != value:
            found[key] = (value, cut)
    return found


def cut_paths(saved: Source) -> None:
    """Cut the paths of this machine in what `save_pretrained` writes beside the weights, or in a GGUF file."""
    if saved.gguf is None:
        for name, content in cut_files(saved.folder, _SAVED).items():
            (saved.folder / name).write_bytes(content)
    elif keys := cut_keys(GgufFile(saved.files[0])):
        replace_strings(saved.files[0], keys)


def check_nothing_private(name: str, content: Path | bytes, own: list[str], token: str | None, *, cut: bool) -> None:
    """PlanError if a file to upload has the user's token, or a path of this machine that cannot be cut.

    cut: the paths in its metadata are cut later.
    """
    if isinstance(content, bytes):
        data = content
    elif _is_weights(content):
        data = _head(content)
    else:
        data = content.read_bytes()
    if token is not None and token.encode() in data:
        raise PlanError(f"{name} has your token of the Hub", "Remove it from the file, and make a new token.")
    if cut or Path(name).name in _TOKENS | _VOCABULARIES:
        return
    for place in own:
        if re.search((re.escape(place) + _END).encode(), data):
            raise PlanError(
                f"{name} has a path of this machine, below {place}", "Remove the path from the file, or the file."
            )


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".gguf") or file.name == SCALES


def _head(file: Path) -> bytes:
    """The texts in a file of weights; of a file that cannot be read, its beginning as it is."""
    try:
        if file.suffix != ".gguf":
            return json.dumps(metadata_of(file), ensure_ascii=False).encode()
        kept = {key: value for key, value in GgufFile(file).metadata.items() if not key.startswith("tokenizer.")}
        raw = [kept.pop(key).raw for key in [*kept] if isinstance(kept[key], Strings)]
        return b"\n".join([json.dumps(kept, ensure_ascii=False, default=str).encode(), *raw])
    except FewbitError:
        with open(file, "rb") as stream:
            return stream.read(_BEGINNING)


def _own(places: list[str]) -> Callable[[str], str]:
    """A function that replaces the paths below these places by their last part, and the home folder by ~."""
    if not places:
        return str
    pattern = re.compile(rf"(?:file://)?(?<![\w.~-])(?:{'|'.join(map(re.escape, places))}){_END}{_PARTS}")
    home = os.path.expanduser("~")

    def last(found: re.Match[str]) -> str:
        path = found[0].removeprefix("file://").rstrip("/")
        return "~" if path == home else path.rpartition("/")[2]

    return lambda text: pattern.sub(last, text)


def _record(text: str) -> str:
    value = json.loads(text)
    return text if (cut := portable(value)) == value else json.dumps(cut)


def _cut_text(text: str, own: Callable[[str], str]) -> str:
    """A text of metadata, which may be JSON."""
    return _cut_json(text, own, record=False, indent=None) if text[:1] in ("{", "[") else own(last_part(text))


def _cut_json(text: str, own: Callable[[str], str], record: bool, indent: int | None = 1) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON: it is no config
        return own(text)
    cut = _cut(portable(value) if record else value, own)
    return text if cut == value else json.dumps(cut, indent=indent, ensure_ascii=False) + ("\n" if indent else "")


def _cut(value: Any, own: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return own(last_part(value))
    if isinstance(value, Mapping):
        return {own(key): each if key in _TOKENS_INSIDE else _cut(each, own) for key, each in value.items()}
    return [_cut(each, own) for each in value] if isinstance(value, list) else value
