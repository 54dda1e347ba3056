"""What others get of a model has no paths of this machine: an upload, and what `save_pretrained` writes.

A record is cut by `portable`. In the other configs and in the metadata of a GGUF file, a value that is an absolute path
is replaced by the last part of that path; other programs write such values, for example `name_or_path`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.gguf_strings import replace_strings
from fewbit.models.scales import GGUF_RECORD
from fewbit.models.source import Source
from fewbit.report.card import last_part, portable
from fewbit.system.publish import RECORD

_SAVED = (RECORD, "config.json", "generation_config.json")
# Vocabularies and templates: what looks like a path there is a token.
_TOKENS = {"tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json"}
_TOKENS_INSIDE = ("added_tokens_decoder", "chat_template", "extra_special_tokens")


def cut_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """File name -> its content without paths of this machine, of those configs among `names` that have such paths."""
    found = {}
    for file in (folder / name for name in names if name.endswith(".json")):
        if file.name in _TOKENS:
            continue
        with suppress(OSError, ValueError, RecursionError):  # not JSON: it is no config
            value = json.loads(file.read_bytes())
            cut = portable(value) if file.name == RECORD else _cut(value)
            if cut != value:
                text = json.dumps(cut, indent=1, ensure_ascii=False) + "\n"
                found[file.relative_to(folder).as_posix()] = text.encode()
    return found


def cut_keys(file: GgufFile) -> dict[str, tuple[str, str]]:
    """Key -> its value and the value without paths of this machine, of the keys of a GGUF file that have such paths."""
    found = {}
    for key, value in file.metadata.items():
        if not isinstance(value, str) or key.startswith("tokenizer."):
            continue
        cut = _record(value) if key == GGUF_RECORD else last_part(value)
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


def _record(text: str) -> str:
    value = json.loads(text)
    return text if (cut := portable(value)) == value else json.dumps(cut)


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return last_part(value)
    if isinstance(value, Mapping):
        return {key: each if key in _TOKENS_INSIDE else _cut(each) for key, each in value.items()}
    return [_cut(each) for each in value] if isinstance(value, list) else value
