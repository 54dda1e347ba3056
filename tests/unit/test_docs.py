"""Code in docs runs as it stands."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.plans.plan import PRESETS, Plan
from tests.docs_pages import blocks

ROOT = Path(__file__).resolve().parents[2]


def code(page: str, language: str) -> list[str]:
    """The blocks of a language in a page that are to run, or are shown, in order."""
    return [block.text for block in blocks(ROOT / page) if block.language == language and block.how is None]


def test_the_toy_scheme_works_from_top_to_bottom(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text("\n".join(code("docs/toy-scheme.md", "python")), encoding="utf-8")
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
    commands = ["trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *code("docs/using.md", "sh")]
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands).replace("8000", port)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr
    for line in "".join(code("docs/using.md", "text")).splitlines():
        assert line in done.stdout, done.stdout


def test_the_schema_of_plans_is_up_to_date_and_holds() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from plan_schema import FILE, schema

    assert json.loads(FILE.read_text(encoding="utf-8")) == schema(), "run python tools/plan_schema.py"
    for plan in PRESETS.values():
        jsonschema.validate(json.loads(json.dumps(plan.to_json())), schema())
    good = {
        "$schema": "plan.schema.json",
        "name": "a",
        "format": "gptq",
        "rules": [{"match": "*", "scheme": "int4-g64"}],
    }
    jsonschema.validate(good, schema())
    assert Plan.from_json(good).rules[0].scheme == "int4-g64"
    rule = {"match": "*", "scheme": None}
    for wrong in (
        {**good, "format": "gtpq"},
        {**good, "rules": [{**rule, "method": "gtpq"}]},
        {**good, "rules": [{**rule, "options": {"dampp": 1}}]},
        {**good, "rule": []},
        {"name": "a", "format": "gptq"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())
        with pytest.raises(PlanError):
            Plan.from_json(wrong)


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
