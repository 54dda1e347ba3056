"""Code in docs runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from fewbit import registry

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_commands_in_the_readme_run(tmp_path: Path) -> None:
    """The first block, as it stands, but for the installation."""
    (block, *_) = blocks("README.md", "sh")
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("fewbit ")]
    assert [command[1] for command in commands] == ["quantize", "evaluate", "generate"]
    outputs = []
    for _, *arguments in commands:
        done = subprocess.run(
            [sys.executable, "-m", "fewbit", *arguments], capture_output=True, text=True, encoding="utf-8", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    (shown,) = blocks("README.md", "text")
    for line in shown.splitlines():
        if line.strip() not in ("", "..."):
            assert line.split()[0] in outputs[0] + outputs[1]
    assert outputs[2].strip()


def test_python_in_the_readme_runs(tmp_path: Path) -> None:
    (script,) = blocks("README.md", "python")
    (tmp_path / "readme.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, "readme.py"], capture_output=True, text=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loss, text = done.stdout.split("\n", 1)
    assert 0 < float(loss) < 0.1
    assert text.startswith("Once upon a time")


def test_the_toy_scheme_works_from_top_to_bottom(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text("\n".join(blocks("docs/toy-scheme.md", "python")), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2176 bytes; rtn")


@pytest.mark.skipif(os.name == "nt", reason="the page has commands for a Unix shell")
def test_the_session_of_using_runs(tmp_path: Path) -> None:
    """All commands of the page, in order, in one shell. Each line of an output that the page shows is printed."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # A server that is left behind by a failure would keep the pipe open.
    commands = ["trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *blocks("docs/using.md", "sh")]
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands).replace("8000", port)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr
    for line in "".join(blocks("docs/using.md", "text")).splitlines():
        assert line in done.stdout, done.stdout


def test_the_table_of_conversions_is_up_to_date() -> None:
    from conversions_table import PAGE, table

    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/conversions_table.py"


def test_the_table_of_formats_is_up_to_date() -> None:
    from formats_table import PAGE, table

    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/formats_table.py"
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name, format in registry.entries("formats").items():
        assert re.search(rf"^\| {name} \| .* \| {re.escape(format.readers)}, fewbit \|$", reference, re.MULTILINE), name


def test_the_page_of_models_is_up_to_date() -> None:
    """Its types are those of the pinned version of transformers."""
    from models_table import PAGE, page

    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if f"transformers=={transformers.__version__}" not in pinned:
        pytest.skip("another version of transformers has other types")
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/models_table.py"


def test_the_page_of_gguf_architectures_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from gguf_table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/gguf_table.py"
    assert "| no |" not in page()  # each row is tested against llama.cpp
