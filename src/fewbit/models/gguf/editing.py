"""Other values for keys of a GGUF file: a chat template, special tokens, numbers of the config.

A value is text, and becomes what the key holds now. `@FILE` means the content of a file, and a special token may be
given as its text.

    tokenizer.chat_template=@template.jinja    tokenizer.ggml.eos_token_id=<|im_end|>    llama.context_length=8192
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from fewbit.checks import is_finite
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.gguf_strings import Strings
from fewbit.models.gguf import config
from fewbit.models.gguf.tokenizer import to_tokenizer
from fewbit.names import expanded

_TOKEN = re.compile(r"tokenizer\.ggml\.\w+_token_id")
_NEW = re.compile(r"tokenizer\.chat_template(\.\w+)?|tokenizer\.ggml\.add_\w+|general\.\w+")  # a file may lack these
# Keys that say how the file itself is read, or how it was made.
_KEPT = re.compile(r"general\.(architecture|alignment|quantization_version|file_type)|split\..*|fewbit\..*")


def changed(file: GgufFile, values: Mapping[str, str]) -> dict[str, Any]:
    """The new values of keys, for `GgufWriter`. PlanError if a key has no such value, or if the file could not be read.

    values: key -> the value as text.
    """
    found = {key: _value(file, key, _text(value)) for key, value in values.items()}
    new = GgufFile(file.path)
    new.metadata |= found
    try:
        config.to_config(new)
        tokenizer = to_tokenizer(new)
    except FormatError as error:
        raise PlanError(f"with these keys the file could not be read: {error.message}") from None
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise PlanError(f"the chat template has an error in line {error.lineno}: {error.message}") from None
    except Exception:
        pass
    return found


def _text(value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        return Path(expanded(value[1:])).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"`set`: {value[1:]} cannot be read: {error.strerror}", "Give KEY=@FILE.") from None
    except UnicodeDecodeError as error:
        raise PlanError(
            f"`set`: {value[1:]} is not UTF-8 at byte {error.start}", "Convert the file to UTF-8."
        ) from None


def _value(file: GgufFile, key: str, text: str) -> Any:
    old = file.metadata.get(key)
    if _KEPT.fullmatch(key):
        raise PlanError(f"{key} cannot be changed: it says how the file is read, or how it was made")
    if _TOKEN.fullmatch(key):
        return _token(file, key, text)
    if old is None and not _NEW.fullmatch(key):
        raise PlanError(f"the file has no key {key}", "fewbit inspect FILE --metadata lists them.")
    if isinstance(old, bool) or (old is None and ".add_" in key):
        if text.lower() not in ("true", "false"):
            raise PlanError(f"{key}={text[:40]}: expected true or false")
        return text.lower() == "true"
    if old is None or isinstance(old, str):
        return text
    if not isinstance(old, (int, float)):
        raise PlanError(f"{key} is a list, and only single values can be changed")
    try:
        number = type(old)(text)
    except ValueError:
        number = None
    if number is None or not is_finite(number):
        raise PlanError(f"{key}={text[:40]}: expected {'an integer' if isinstance(old, int) else 'a number'}")
    return number


def _token(file: GgufFile, key: str, text: str) -> int:
    """The id of a token, given as its text or as the id."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Strings):
        raise PlanError(f"{key}: the file has no tokens")
    tokens = tokens.tolist()
    if text in tokens:
        return tokens.index(text)
    if text.isdecimal() and int(text) < len(tokens):
        return int(text)
    raise PlanError(f"{key}={text[:40]}: the file has no such token")
