"""What a tokenizer becomes before it is written to a GGUF file: it splits text as its tokenizer.json says, and the name
of the model makes llama.cpp treat added tokens as the tokenizer does.

transformers builds some tokenizers anew: a folder with `"tokenizer_class": "GPT2Tokenizer"` splits text by GPT-2's
pattern, whatever its tokenizer.json says. Models are trained with tokenizer.json, and llama.cpp's converter identifies
its pattern.

llama.cpp has no key for added tokens that take the spaces after them (`rstrip`). It goes by the model's name: if this
has phi-3 or phi3 in it, all added tokens do but three.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fewbit.errors import FormatError
from fewbit.models.gguf.patterns import NAMED_PHI3, NEVER_RSTRIP
from fewbit.models.gguf.tokenizer_check import TEXTS


def named(tokenizer: Any, name: str) -> str:
    """The name of the model in the file: another if llama.cpp would treat added tokens in another way because of it."""
    added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    taking = {each["content"] for each in added if each["rstrip"]}
    if taking and taking == {each["content"] for each in added} - NEVER_RSTRIP:
        return name if NAMED_PHI3.search(name) else f"{name} (phi-3)"
    return name if taking else NAMED_PHI3.sub("phi 3", name)


def as_stored(tokenizer: Any, folder: Path) -> tuple[Any, str | None]:
    """The tokenizer with the steps of tokenizer.json in `folder`, and a note if these split text in another way.

    The tokenizer itself if it is one of SentencePiece, or if `folder` has no such file.
    """
    path = folder / "tokenizer.json"
    if not path.is_file() or getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer, None
    try:
        stored = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise FormatError(f"{path} is no tokenizer: {str(error)[:200]}") from None
    if getattr(stored.model, "byte_fallback", False):
        return tokenizer, None
    made = deepcopy(tokenizer)
    for part in ("model", "normalizer", "pre_tokenizer"):
        setattr(made.backend_tokenizer, part, getattr(stored, part))
    for text in TEXTS:
        if tokenizer(text)["input_ids"] != made(text)["input_ids"]:
            return made, (
                f"the file splits text as tokenizer.json says, and transformers' {type(tokenizer).__name__} does not: "
                f"the token ids of {text[:40]!r} differ"
            )
    return tokenizer, None
