"""Run the notebooks of examples/ and store their outputs: `make notebook`.

They run offline, each in an empty folder. The notebook's metadata keep a digest of what the outputs depend on: the code
cells, the modules beside the notebook, and fewbit's version and public names. `make check` fails if it is out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import site
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TIMEOUT = 600  # seconds for a cell


def main() -> None:
    """Run all notebooks, or those that are named."""
    named = [Path(name) for name in sys.argv[1:]]
    for file in named or sorted(EXAMPLES.glob("*.ipynb")):
        notebook = read(file)
        execute(notebook, file.resolve().parent)
        without_places(notebook)
        notebook.metadata["fewbit"] = {"digest": digest(file, notebook)}
        write(file, notebook)
        print(f"{file.name}: {sum(len(cell.get('outputs', ())) for cell in notebook.cells)} outputs")


def read(file: Path) -> Any:
    import nbformat

    return nbformat.reads(file.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def write(file: Path, notebook: Any) -> None:
    import nbformat

    nbformat.validate(notebook)
    file.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")  # type: ignore[no-untyped-call]


def execute(notebook: Any, beside: Path) -> None:
    """Run all cells of `notebook` in an empty folder. Modules in the folder `beside` can be imported."""
    import nbclient

    kept = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="notebook-") as place:
        path = os.pathsep.join(filter(None, [str(beside), os.environ.get("PYTHONPATH", "")]))
        os.environ.update({**OFFLINE, "PYTHONPATH": path, "TMPDIR": place, "FEWBIT_CACHE": place})
        try:
            nbclient.NotebookClient(
                notebook,
                timeout=TIMEOUT,
                iopub_timeout=TIMEOUT,  # after its 4 seconds, outputs of a busy machine would be left out
                coalesce_streams=True,
                resources={"metadata": {"path": place}},
            ).execute()
        finally:
            os.environ.clear()
            os.environ.update(kept)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of day when it ran


def without_places(notebook: Any) -> None:
    """Remove the folders of this machine from the outputs. Exits with an error if one is left."""
    packages = sorted({*site.getsitepackages(), str(ROOT / "src"), str(ROOT)}, key=len, reverse=True)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
                if isinstance(text := holder.get(key), str):
                    for place in packages:
                        text = text.replace(f"{place}/", "")
                    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/ipykernel_\d+/\d+\.py:", "In[]:", text)
                    holder[key] = text
    outputs = json.dumps([cell.get("outputs", ()) for cell in notebook.cells])
    for place in {*packages, sys.prefix, tempfile.gettempdir(), str(Path.home())} - {"/"}:
        if place in outputs:
            sys.exit(f"the outputs contain {place}, a folder of this machine")


def digest(file: Path, notebook: Any = None) -> str:
    """SHA-256 of what the outputs of a notebook depend on, as far as it is not the machine."""
    import fewbit

    cells = (json.loads(file.read_text(encoding="utf-8")) if notebook is None else notebook)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    modules = [module.read_text(encoding="utf-8") for module in sorted(file.parent.glob("*.py"))]
    data = [code, modules, fewbit.__version__, sorted(fewbit.__all__)]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def outdated(file: Path) -> str | None:
    """What is wrong with the outputs of a notebook; None if nothing is."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        return "its cells were not run in order"
    if notebook["metadata"].get("fewbit", {}).get("digest") != digest(file):
        return "its outputs are older than its cells, or than fewbit's version or public names"
    return None


if __name__ == "__main__":
    main()
