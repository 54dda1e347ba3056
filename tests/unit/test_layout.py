"""The shape of the source: no circles, short parameter lists, rooms that say what they are."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewbit
from fewbit.models.gguf.architectures import ARCHITECTURES

SOURCE = Path(fewbit.__file__).parent
EXAMPLES = sorted(file for file in (SOURCE.parents[1] / "examples").rglob("*") if file.suffix in (".py", ".ipynb"))
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES = 520
# Verbs and the command line take what users give them as keywords.
MOST_PARAMETERS = {"pipeline": 5, "api": 18, "cli": 40}


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, known: set[str]) -> Iterator[str]:
    """The modules of fewbit that a file imports, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fewbit":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle in order, [] if there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*path, node]):
                return found
        done.add(node)
        return []

    for node in sorted(graph):
        if found := walk(node, []):
            return found
    return []


def graph_of_files() -> dict[str, set[str]]:
    known = {module_of(file) for file in FILES}
    # The package hands out the verbs, lazily; that a module reads fewbit.__version__ is no arrow up.
    found = {module_of(file): set(imports(file, known)) - {"fewbit"} for file in FILES}
    return {module: others - {module} for module, others in found.items() if module != "fewbit"}


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_file_is_in_a_circle() -> None:
    assert circle(graph_of_files()) == []


@pytest.mark.parametrize("room", ["fewbit", "fewbit.models"])
def test_no_room_is_in_a_circle(room: str) -> None:
    """Rooms are the folders and files of a package; inside of models too."""
    depth = room.count(".") + 2

    def name(module: str) -> str:
        return ".".join(module.split(".")[:depth])

    graph: dict[str, set[str]] = {}
    for module, others in graph_of_files().items():
        if module.startswith(f"{room}."):
            inside = {name(other) for other in others if other.startswith(f"{room}.")}
            graph.setdefault(name(module), set()).update(inside - {name(module)})
    assert len(graph) > 10
    assert circle(graph) == []


def test_every_room_says_what_it_is() -> None:
    for file in FILES:
        if file.name == "__init__.py":
            said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert (said or "").partition("\n")[0].endswith("."), file


def test_no_room_has_the_name_of_a_verb() -> None:
    verbs = set(fewbit.__all__)
    assert not [file for file in FILES if file.parent == SOURCE and file.stem in verbs]
    assert not [room for room in SOURCE.iterdir() if room.is_dir() and room.name in verbs]


def test_parameter_lists_are_short() -> None:
    long = []
    for file in FILES:
        if file.name.endswith("in_triton.py"):  # a kernel of Triton takes every tensor and number apart
            continue
        most = MOST_PARAMETERS.get(file.relative_to(SOURCE).parts[0], 8)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
                count = len([name for name in names if name not in ("self", "cls", "ctx")])
                if count > most:
                    long.append(f"{file.relative_to(SOURCE)}: {node.name} has {count} parameters, not {most}")
    assert not long, "\n".join(long)


def test_files_are_short() -> None:
    long = {
        str(f.relative_to(SOURCE)): n
        for f in FILES
        if (n := len(f.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long


def test_the_library_does_not_speak_in_flags() -> None:
    """Errors outside cli/ name arguments, which `errors.in_flags` turns into flags. Commands to copy may have flags."""
    found = []
    for file in FILES:
        if file.relative_to(SOURCE).parts[0] in ("cli", "data") or file.name == "errors.py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        for call in raised:
            for node in ast.walk(call):
                text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
                if re.search(r"(?<![\w-])--[a-z]", text) and not re.search(r"fewbit |pip |torchrun", text):
                    found.append(f"{file.relative_to(SOURCE)}: {text}")
    assert not found, "\n".join(found)


def branches(code: str, names: set[str]) -> list[int]:
    """Lines of `code` that compare something with one of `names`, or look it up in a table of them."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Compare | ast.Dict):
            continue
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        sides += [key for key in node.keys if key is not None] if isinstance(node, ast.Dict) else []
        words = [word.value for side in sides for word in ast.walk(side) if isinstance(word, ast.Constant)]
        lines += [node.lineno] if names & {word for word in words if isinstance(word, str)} else []
    return sorted(lines)


def test_an_architecture_of_gguf_files_is_one_row() -> None:
    # "gpt2" and "llama" are also the kinds of tokenizers in a file. llama.cpp's rules of mixtures know one model.
    others = {
        *(SOURCE / "models/gguf/rows").glob("*.py"),
        SOURCE / "models/gguf/tokenizer.py",
        SOURCE / "plans/mixtures.py",
    }
    found = {str(file): branches(file.read_text("utf-8"), set(ARCHITECTURES)) for file in FILES if file not in others}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_a_branch_on_an_architecture_is_found() -> None:
    assert branches(
        'if arch.name == "phi3":\n    x = {"gemma2": 2}\nelif arch in ("llama", "qwen3"): ...', set(ARCHITECTURES)
    ) == [1, 2, 3]


def code_of(example: Path) -> str:
    text = example.read_text(encoding="utf-8")
    if example.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def private(code: str) -> list[str]:
    """What `code` uses of fewbit that is not a public name."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "fewbit":
            found += [alias.name for alias in node.names if alias.name not in fewbit.__all__]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fewbit."):
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("fewbit.")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fewbit":
            found += [node.attr] if node.attr not in fewbit.__all__ else []
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.name)
def test_examples_use_only_public_names(example: Path) -> None:
    assert private(code_of(example)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import fewbit.models.source",
        "from fewbit.texts.calibration import Calibration",
        "from fewbit import hook",
        "import fewbit\nfewbit.hook.prefer(set())",
    ],
)
def test_private_names_in_examples_are_found(code: str) -> None:
    assert private(code)


def test_a_test_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_module\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(SOURCE.parents[1] / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert "No module named 'no_such_module'" in done.stdout
