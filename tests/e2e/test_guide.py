"""The guide's notebook runs from start to end, on the model that comes with fewbit."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from tests.limits import HANG

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

PLACE = Path(__file__).parents[2] / "examples"
CALLS = {  # what the guide calls, each with the keywords that it is about
    "GPTQConfig": {"bits", "dataset", "tokenizer"},
    "AwqConfig": {"do_fuse", "fuse_max_seq_len"},
    "BitsAndBytesConfig": {"load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"},
    "AutoModelForCausalLM.from_pretrained": {"quantization_config", "device_map", "gguf_file"},
    "AutoTokenizer.from_pretrained": {"gguf_file"},
    "quantized.save_pretrained": set(),
}


def read() -> Any:
    return nbformat.read(PLACE / "quantization_guide.ipynb", as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_runs_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read()
    (names,) = [cell for cell in code(notebook) if "names" in cell.metadata.get("tags", [])]
    assert 'make("tiny")' in names.source
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLACE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=int(HANG), resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in code(notebook))
    table = text_of(code(notebook)[-2])
    print(table)
    assert [line[:26].strip() for line in table.splitlines()][1:] == [
        "original",
        "8 bits",
        "NF4, double quantization",
        "GPTQ, just made",
        "GPTQ",
        "AWQ, fused",
        "GGUF",
    ]
    # Quantizing while loading shows how far it is.
    assert "block 8/8" in "".join(text_of(cell) for cell in code(notebook))


def text_of(cell: Any) -> str:
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def test_it_calls_what_the_guide_calls() -> None:
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse("\n".join(cell.source for cell in code(read())))):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), set()).update(word.arg for word in node.keywords if word.arg)
    for call, keywords in CALLS.items():
        assert keywords <= found.get(call, set()), call


def test_what_is_committed_was_run_in_order() -> None:
    assert [cell.execution_count for cell in code(read())] == list(range(1, len(code(read())) + 1))
    assert not [output for cell in code(read()) for output in cell.outputs if output.output_type == "error"]
    table = text_of(code(read())[-2])
    assert table.count("\n") == 8
    assert not any(place in str(read()) for place in ("/tmp", "site-packages"))
