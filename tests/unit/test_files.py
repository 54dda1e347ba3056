"""Files of others are UTF-8 in every locale, and what they are not is said with file and line."""

from __future__ import annotations

import ast
import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.errors import FormatError, PlanError
from fewbit.models.decoding.generate import prompt_ids
from fewbit.models.source import read_config
from fewbit.system.files import parse_json, read_text
from fewbit.texts.sources import load_text
from tests import models

SOURCE = Path(__file__).parents[2] / "src"


def test_half_a_character_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"fine"\n{"text": "\\ud83d cut"}\n', encoding="utf-8")
    with pytest.raises(FormatError, match=r"a\.jsonl, line 2: \\ud83d is half a character"):
        load_text(str(path))
    assert parse_json('"\\ud83d\\ude00"', "x") == "\N{GRINNING FACE}"


def test_deep_nesting_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"fine"\n' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(FormatError, match=r"a\.jsonl, line 2: JSON nested too deep"):
        load_text(str(path))
    (tmp_path / "config.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(FormatError, match=r"config\.json: JSON nested too deep"):
        read_config(tmp_path)


def test_what_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    for content, words in (
        (b"one\ntw\xff", "not UTF-8 at byte 6, line 2"),
        ("one".encode("utf-16"), "(?s)not UTF-8.*looks like UTF-16"),
        (b"one\n\0", "NUL in line 2"),
    ):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(FormatError, match=words):
            load_text(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert load_text(str(tmp_path / "a.txt")).documents == ("one\ntwo",)


def test_a_packed_text_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"whole")[:-9])
    with pytest.raises(FormatError, match=r"a\.gz is not a valid gzip file"):
        read_text(path)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_not_utf8(chat: bool) -> None:
    with pytest.raises(PlanError, match=r"byte 0xff is not UTF-8 \(character 2\)"):
        prompt_ids(models.tokenizer(models.CHAT), "a\udcff", chat=chat)


def test_a_config_is_utf8_in_a_c_locale(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"note": "gr\u00f6\u00dfer"}', encoding="utf-8")
    code = "import sys, pathlib, fewbit.models.source as s; print(ascii(s.read_config(pathlib.Path(sys.argv[1]))))"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert done.stdout == "{'note': 'gr\\xf6\\xdfer'}\n", done.stderr


def test_every_text_file_is_opened_with_its_encoding() -> None:
    wrong = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg for keyword in node.keywords}
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            process = name in ("run", "Popen", "check_output") and "text" in given
            if (name in ("read_text", "write_text") or process) and "encoding" not in given:
                wrong.append(f"{file.relative_to(SOURCE)}:{node.lineno}")
    assert not wrong
