"""Reads and writes text and JSON files as UTF-8 in every locale. Errors name the file, and the line if known."""

from __future__ import annotations

import gzip
import io
import json
import re
import secrets
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewbit.errors import FormatError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped UTF-16 surrogate: valid only as one half of a pair
_LONE = re.compile("[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """The text of a file, decompressed if its name ends in .gz. FormatError unless it is UTF-8 (a BOM is allowed)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"{path} is not a valid gzip file: {error}") from None
    return decoded(data, str(path))


def decoded(data: bytes, where: str) -> str:
    """Bytes decoded to text, with "\\n" as line ending. FormatError unless they are UTF-8 without NUL bytes."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{where}: not UTF-8 at byte {error.start}, line {line}", _convert(data)) from None
    if (at := text.find("\0")) >= 0:
        raise FormatError(f"{where}: not text: NUL in line {text.count(chr(10), 0, at) + 1}", _convert(data))
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def parse_json(text: str, where: str, hint: str = "") -> Any:
    """The value of the JSON in `text`. FormatError with `hint` if it is not JSON or UTF-8 cannot encode its strings."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deep", hint) from None
    except ValueError as error:
        raise FormatError(f"{where}: not JSON: {error}", hint) from None
    if _SURROGATE.search(text) and (lone := _LONE.search(json.dumps(value, ensure_ascii=False))):
        raise FormatError(
            f"{where}: \\u{ord(lone[0]):04x} is half a character",
            "Half of a surrogate pair is missing. Remove the escape, or replace it with \\ufffd.",
        )
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file. FormatError unless it is JSON in UTF-8."""
    return parse_json(read_text(path), str(path))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    path.write_text(text, encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8. Whatever happens, `path` has its old content or all of the new one."""
    real = path.resolve()
    hidden = real.with_name(f".{real.name}.{secrets.token_hex(4)}.part")
    try:
        write_text(hidden, text)
        with suppress(OSError):  # there is none before, or the file system has no modes
            shutil.copymode(real, hidden)
        hidden.replace(real)
    finally:
        hidden.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any], indent: int = 1) -> None:
    """Write a JSON object, followed by a newline."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def unwritable(text: str) -> str | None:
    """Why `text` cannot be encoded as UTF-8, or None if it can.

    Python decodes command-line arguments that are not UTF-8 to lone surrogates.
    """
    if (lone := _LONE.search(text)) is None:
        return None
    code = ord(lone[0])
    what = (
        f"byte 0x{code - 0xDC00:02x} is not UTF-8" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x} is half a character"
    )
    return f"{what} (character {lone.start() + 1})"


def _convert(data: bytes) -> str:
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]
    return "It looks like UTF-16. Convert the file to UTF-8." if wide else "Convert the file to UTF-8."
