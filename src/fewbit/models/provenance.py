"""What a model card says of the model that an output was made from: its name on the Hub, its licence and its task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.safetensors import CARD, ORIGINAL_CARD, card_of
from fewbit.models.source import Source
from fewbit.names import DEMO, EMBEDDED

_TAKEN = ("license", "license_name", "license_link", "language", "pipeline_tag")
_SNAPSHOT = re.compile(r"models--([\w.\-]+?)--([\w.\-]+)")  # a folder in the cache of the Hub


def provenance(source: Source) -> dict[str, Any]:
    """The entry `base` of the record of an output that is made from `source`.

    `model`: its name on the Hub, or None. The metadata of its card, if they are there: `license`, `license_name`,
    `license_link`, `language`, `pipeline_tag`. The task is that of the config if the card names none.
    """
    found: dict[str, Any] = {"model": _hub_name(source)}
    for name in (card_of(source.beside), source.beside / ORIGINAL_CARD, source.beside / CARD):
        if name is not None and name.is_file():
            said = _metadata(name)
            found |= {key: said[key] for key in _TAKEN if said.get(key)}
            break
    if source.gguf is not None:
        stated = GgufFile(source.files[0]).metadata.get("general.license")
        found |= {"license": stated} if isinstance(stated, str) and stated else {}
    found.setdefault("pipeline_tag", _task(source.config))
    return found


def _hub_name(source: Source) -> str | None:
    if source.hosted:
        return None if source.name in (EMBEDDED, DEMO) else source.name
    for part in source.origin.parts:
        if part.startswith("models--") and (name := _SNAPSHOT.fullmatch(part)):
            return f"{name[1]}/{name[2]}"
    return None


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card. Empty if there are none, or if they are no YAML: the card is another's."""
    try:
        return dict(metadata_load(card) or {})
    except Exception:  # YAML's own errors, an encoding
        return {}


def _task(config: dict[str, Any]) -> str:
    if any(isinstance(config.get(key), dict) for key in ("vision_config", "visual")):
        return "image-text-to-text"
    if isinstance(config.get("audio_config"), dict):
        return "audio-text-to-text"
    return "text2text-generation" if config.get("is_encoder_decoder") else "text-generation"
