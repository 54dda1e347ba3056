"""The code blocks of README and of the pages in docs/, run in order.

`python -m tests.docs_pages PAGE` prints what the blocks of a page print, to write the page; with `--check`, it compares
them with what the page shows, and ends with 1 and the first difference.

Blocks in `sh` and `python` are run, those in `json` are read, and those in `text` are what the block before prints.
A comment before a block says why it is not run: `<!-- not run: REASON -->`, or `<!-- parsed: REASON -->` where its
commands are only parsed. Lines with `pip install` are not run, because tests use no network. In a `text` block, `...`
stands for lines that are left out, or for the rest of a line. Numbers may differ by a tenth, as processors do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:^<!-- (?P<how>not run|parsed): (?P<why>[^\n]+) -->\n\n?)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"^\s*(fewbit|pip|python|torchrun|make|import|from) ", re.MULTILINE)
INDENTED = re.compile(r"\n\n {4}(fewbit|pip|python|torchrun|make|import|from) ")
COLUMNS = "100"


@dataclass(frozen=True)
class Block:
    """A fenced block: its line in the page, and how it is treated if not run (`how`, with the reason `why`)."""

    line: int
    language: str
    text: str
    how: str | None
    why: str | None


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, m.start("text")), m["language"], m["text"], m["how"], m["why"])
        for m in BLOCK.finditer(text)
    ]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a shell block, each with its here-document."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if not line.strip() or line.startswith(("#", "pip install")):
            continue
        document = []
        if found := re.search(r"<<'(\w+)'", line):
            for inner in lines:
                if inner == found[1]:
                    break
                document.append(inner + "\n")
        yield line, "".join(document)


def parse(text: str) -> None:
    """Check the options of the commands `fewbit ...`: SystemExit or click's error if one does not exist."""
    import typer.main

    from fewbit.cli.app import app
    from fewbit.cli.options import method_flags

    group: Any = typer.main.get_command(app)
    for line, _ in commands(text):
        words = shlex.split(line, comments=True)
        if "fewbit" in words:
            name, *arguments = words[words.index("fewbit") + 1 :]
            if name == "quantize":
                arguments, _ = method_flags(group.commands[name], arguments)
            group.commands[name].make_context(name, arguments)


class Session:
    """Runs the blocks of one page, in this process where it can, with one folder and one namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "page"}

    def run(self, block: Block) -> str:
        """What the block prints on stdout. An exception if it fails."""
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed), _as_a_user():
            if block.language == "python":
                exec(compile(block.text, f"line {block.line}", "exec", dont_inherit=True), self.names)
            else:
                for line, document in commands(block.text):
                    self._command(line, document)
        return printed.getvalue()

    def _command(self, line: str, document: str) -> None:
        words = shlex.split(line, comments=True)
        if words[0] == "fewbit" and not {"|", "||", ">", "&", "<"} & set(words):
            from fewbit.cli import app

            with mock.patch.object(sys, "argv", words):
                try:
                    app.main()
                except SystemExit as end:
                    if end.code:
                        raise RuntimeError(f"{line}: exit code {end.code}") from end
            return
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        whole = f"{line}\n{document}{line.split(chr(39))[1]}\n" if document else line
        done = subprocess.run(
            ["bash", "-e", "-c", whole],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PATH": path},
        )
        if done.returncode:
            raise RuntimeError(f"{line}: {done.stderr}")
        print(done.stdout, end="")


@contextlib.contextmanager
def _as_a_user() -> Iterator[None]:
    """Warnings are no errors, and kernels are those that a user gets."""
    with mock.patch.dict(os.environ, {"COLUMNS": COLUMNS}), warnings.catch_warnings():
        os.environ.pop("FEWBIT_ACTIVATIONS", None)
        warnings.simplefilter("ignore")
        yield


def unlike(shown: str, printed: str) -> str | None:
    """The first line of `shown` that is not in `printed`, in order; None if all are."""
    left = printed.splitlines()
    for line in shown.splitlines():
        if line.strip() in ("", "..."):
            continue
        at = next((i for i, other in enumerate(left) if _like(line, other)), None)
        if at is None:
            return line
        left = left[at + 1 :]
    return None


def _like(shown: str, printed: str) -> bool:
    ours, theirs = shown.split(), printed.split()
    if ours[-1] == "...":
        ours = ours[:-1]
        theirs = theirs[: len(ours)] if len(theirs) >= len(ours) else theirs
    return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _same(a: str, b: str) -> bool:
    if a == b:
        return True
    number = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
    if number.sub("#", a) != number.sub("#", b):
        return False
    values = [[float(n.replace(",", "")) for n in number.findall(text)] for text in (a, b)]
    return all(abs(x - y) <= 0.1 * max(abs(x), abs(y)) for x, y in zip(*values, strict=True))


def check(page: Path, folder: Path) -> None:
    """Run the blocks of a page; AssertionError where one prints something else than the page shows."""
    session, printed = Session(folder), ""
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.how == "parsed":
            parse(block.text)
        elif block.how is None and block.language in ("sh", "python"):
            printed = session.run(block)
        elif block.language == "json":
            found = json.loads(block.text)
            if "rules" in found:
                from fewbit.plans.plan import Plan

                Plan.from_json(found)
        elif block.language == "text" and block.how is None:
            line = unlike(block.text, printed)
            assert line is None, f"{where}: {line!r} is not in\n{printed}"


def checked(page: Path, folder: Path) -> str:
    """The error of `check` in a process of its own, where no other test has left anything; empty if there is none."""
    command = [sys.executable, "-m", "tests.docs_pages", "--check", str(page), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    return "" if done.returncode == 0 else done.stderr


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(Path(sys.argv[2]), Path(sys.argv[3]))
        sys.exit()
    with tempfile.TemporaryDirectory() as place:
        session = Session(Path(place))
        for block in blocks(ROOT / sys.argv[1]):
            if block.how is None and block.language in ("sh", "python"):
                print(f"=== line {block.line}\n{block.text}---\n{session.run(block)}", flush=True)
