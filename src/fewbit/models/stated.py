"""Numbers that a config.json states, read without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewbit.errors import FormatError, PlanError
from fewbit.names import DEMO, EMBEDDED, path_of
from fewbit.system.files import read_json

ROWS = ("vocab_size",)  # keys of the rows of the token embedding
TINY = Path(__file__).parent.parent / "data" / EMBEDDED
_LANGUAGE = ("text_config", "llm_config", "language_config", "thinker_config")  # configs inside of a config


def language(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model inside a config of a model with towers; empty if there is none."""
    found = next((inner for key in _LANGUAGE if isinstance(inner := config.get(key), dict)), {})
    return (language(found) or found) if found else {}


def number(config: Mapping[str, Any], keys: tuple[str, ...], folder: Path) -> int | None:
    """The value of the first of `keys` in the config of the language model inside `config`, or in `config` itself.

    None if there is none. folder: of the config. FormatError if the value is not an integer above 0.
    """
    inner = language(config)
    for stated in (inner, config) if inner else (config,):
        for key in keys:
            if (found := stated.get(key)) is None:
                continue
            if not isinstance(found, int) or isinstance(found, bool) or found < 1:
                raise FormatError(f"{folder / 'config.json'}: {key} is {found!r}, not an integer above 0")
            return found
    return None


def check_rows(one: str | Path, rows: int | None, other: str | Path, others: int | None) -> None:
    """PlanError if two models have different numbers of rows in their token embeddings. None: it is not known."""
    if rows is not None and others is not None and rows != others:
        raise PlanError(
            f"the vocabulary of {one} has {rows} entries, and that of {other} {others}",
            "Compare models with the same vocabulary.",
        )


def check_vocabularies(reference: str | Path, model: str | Path) -> None:
    """`check_rows` for two models whose folders have a config.json. Any other fault is found when they are loaded."""
    if DEMO in (reference, model):  # its folder is made when it is loaded
        return
    with suppress(OSError, FormatError, AttributeError):
        found = [
            number(read_json(folder / "config.json"), ROWS, folder)
            for folder in (path_of(reference) or TINY, path_of(model) or TINY)
        ]
        check_rows(reference, found[0], model, found[1])
