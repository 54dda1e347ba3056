"""Files of others are UTF-8 in every locale, and what they are not is said with file and line."""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.safetensors import FileWriter, ShardWriter, files_in, read_file
from fewbit.models.decoding.generate import prompt_ids
from fewbit.models.source import read_config
from fewbit.schemes.base import PartSpec
from fewbit.system.files import parse_json, read_text
from fewbit.texts.sources import load_text
from tests import models

ROOT = Path(__file__).parents[2]


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


# Calls that open a text file or a text pipe, each with the position of its mode; None if it has none.
OPENERS: dict[str, int | None] = {
    "read_text": None,
    "write_text": None,
    "open": 0,
    "fdopen": 1,
    "NamedTemporaryFile": 0,
    "TemporaryFile": 0,
}
BINARY = {"NamedTemporaryFile", "TemporaryFile"}  # unless the mode says otherwise
PIPES = {"run", "Popen", "check_output"}
OTHERS = {"bz2", "gzip", "lzma", "os", "tarfile", "webbrowser", "zipfile"}  # modules whose open() is another


def unnamed(source: str) -> list[int]:
    """Lines that open a text without naming its encoding, so that it is the locale's."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and opens_text(node)]


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a text and names no encoding."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or None in given:
        return False
    if isinstance(call.func, ast.Name):
        name, owner = call.func.id, ""
        places: dict[str, int | None] = {"open": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
    elif isinstance(call.func, ast.Attribute):
        name, places = call.func.attr, OPENERS
        owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    else:
        return False
    if name in PIPES and owner == "subprocess":
        return "text" in given or "universal_newlines" in given
    if name not in places or (name == "open" and owner in OTHERS):
        return False
    place = places[name]
    if place is None:
        return len(call.args) <= (name == "write_text")
    mode = given.get("mode") or (call.args[place] if len(call.args) > place else None)
    text = mode.value if isinstance(mode, ast.Constant) else "b" if mode is not None or name in BINARY else "r"
    return isinstance(text, str) and "b" not in text


@pytest.mark.parametrize("folder", ["src", "tests", "tools", "benchmarks", "examples"])
def test_every_text_file_is_opened_with_its_encoding(folder: str) -> None:
    wrong = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        wrong += [f"{file.relative_to(ROOT)}:{line}" for line in unnamed(file.read_text(encoding="utf-8"))]
    for file in sorted((ROOT / folder).rglob("*.ipynb")):
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                wrong += [f"{file.relative_to(ROOT)}: {cell['id']}" for _ in unnamed("".join(cell["source"]))]
    assert not wrong


def test_a_text_in_the_encoding_of_the_locale_is_found() -> None:
    for wrong in (
        "path.read_text()",
        "path.write_text(text)",
        "open(path)",
        'open(path, "w")',
        'path.open("a")',
        "path.open()",
        'os.fdopen(handle, "w")',
        'tempfile.NamedTemporaryFile("w")',
        "subprocess.run(command, text=True)",
    ):
        assert unnamed(wrong) == [1], wrong
    for right in (
        'path.read_text(encoding="utf-8")',
        'path.read_text("utf-8")',
        'path.open("rb")',
        'open(path, mode="wb")',
        "open(path, **options)",
        "tempfile.NamedTemporaryFile()",
        "os.open(path, flags)",
        "gzip.open(path)",
        "read_text(path)",
        "subprocess.run(command, capture_output=True)",
    ):
        assert unnamed(right) == [], right


DTYPES = [
    *(torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16, torch.uint16),
    *(torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool),
]


def of_every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.randint(0, 2, (5, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = {f"{n % 3}.{n}": numbers.to(d) if d.itemsize > 1 else numbers.clone().view(d) for n, d in enumerate(DTYPES)}
    return {**found, 'é"\n': torch.ones(3).bfloat16(), "none": torch.zeros(0, 4), "one": torch.tensor(1.5)}


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    """Tensors come in another order than in the file, and are not contiguous."""
    tensors = of_every_dtype()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    writer = FileWriter(tmp_path / "ours", {name: PartSpec.of(tensor) for name, tensor in tensors.items()})
    for name, tensor in reversed(tensors.items()):
        writer.add(name, tensor.T.contiguous().T if tensor.dim() == 2 else tensor)
    writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_keep_no_tensor_in_memory(tmp_path: Path) -> None:
    specs = {str(number): PartSpec((4,), torch.float32) for number in range(7)}
    writer = ShardWriter(tmp_path, specs, limit=48)
    for name in specs:
        tensor = torch.full((4,), float(name))
        held = weakref.ref(tensor)
        writer.add(name, tensor)
        del tensor
        assert held() is None
    writer.close()
    files = files_in(tmp_path)
    assert [len(read_file(file)[0]) for file in files] == [3, 3, 1]
    assert {name: float(t[0]) for file in files for name, t in read_file(file)[0].items()} == {
        n: float(n) for n in specs
    }
    assert writer.nbytes == 7 * 16


def test_a_tensor_that_is_missing_or_another_one_is_an_error(tmp_path: Path) -> None:
    writer = FileWriter(tmp_path / "file", {"a": PartSpec((2,), torch.float32), "b": PartSpec((2,), torch.float32)})
    writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match="1 tensors were never written; the first is b"):
        writer.close()
    with pytest.raises(ValueError, match=r"b is .*float16.* expected .*float32"):
        writer.add("b", torch.ones(2).half())
