"""The guide's notebook runs from start to end, on the model that comes with fewbit."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import site
from pathlib import Path
from typing import Any

import pytest

import fewbit

for package in ("nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "quantization_guide.ipynb"
CALLS = {  # what the guide calls, each with the keywords that it is about
    "GPTQConfig": {"bits", "dataset", "tokenizer"},
    "AwqConfig": {"do_fuse", "fuse_max_seq_len"},
    "BitsAndBytesConfig": {"load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"},
    "AutoModelForCausalLM.from_pretrained": {"quantization_config", "device_map", "gguf_file"},
    "AutoTokenizer.from_pretrained": {"gguf_file"},
    "quantized.save_pretrained": set(),
}


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "tools" / "run_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read() -> Any:
    return tool().read(GUIDE)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_runs_from_start_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read()
    (names,) = [cell for cell in code(notebook) if "names" in cell.metadata.get("tags", [])]
    assert 'make("tiny")' in names.source
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tool().execute(notebook, GUIDE.parent)
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
        "compressed-tensors",
        "4.25 bits, chosen",
    ]
    # Quantizing shows its progress, by a verb and while loading.
    assert ["block 8/8" in text_of(cell) for cell in code(notebook)].count(True) == 2
    tool().without_places(notebook)


def text_of(cell: Any) -> str:
    """What the cell shows, without the warnings of other libraries."""
    shown = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown)


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
    assert table.count("\n") == 10
    assert not any(place in str(read()) for place in ("/tmp", "site-packages"))
    assert tool().outdated(GUIDE) is None


@pytest.mark.parametrize("change", ["cell", "module", "version", "verb", "order"])
def test_outputs_that_are_older_are_noticed(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / GUIDE.name
    shutil.copy(GUIDE, file)
    shutil.copy(GUIDE.parent / "stand_ins.py", tmp_path)
    assert tool().outdated(file) is None
    notebook = json.loads(GUIDE.read_text(encoding="utf-8"))
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    if change == "cell":
        first["source"].append("\nprint(1)")
    elif change == "order":
        first["execution_count"] = 99
    elif change == "module":
        (tmp_path / "stand_ins.py").write_text("", encoding="utf-8")
    elif change == "version":
        monkeypatch.setattr(fewbit, "__version__", "99.0")
    else:
        monkeypatch.setattr(fewbit, "__all__", [*fewbit.__all__, "other"])
    file.write_text(json.dumps(notebook), encoding="utf-8")
    assert ("in order" if change == "order" else "older than") in tool().outdated(file)


def test_folders_of_this_machine_do_not_stay_in_outputs(tmp_path: Path) -> None:
    notebook = read()
    (output, *_) = next(cell for cell in code(notebook) if cell.outputs).outputs
    output["text"] = f"{site.getsitepackages()[0]}/transformers/auto.py:1: UserWarning: ..."
    tool().without_places(notebook)
    assert output["text"] == "transformers/auto.py:1: UserWarning: ..."
    output["text"] = f"written to {tmp_path}"
    with pytest.raises(SystemExit, match="a folder of this machine"):
        tool().without_places(notebook)
