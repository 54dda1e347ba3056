"""`fewbit cache` shows what fewbit keeps in its cache, and deletes only that."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewbit.cli import cache as command
from fewbit.cli.app import app
from fewbit.system import kept, locks
from fewbit.system.cache import made

DAY = 86400


@pytest.fixture
def filled(own_cache: Path) -> Path:
    """A cache with an entry of each kind, a run of 40 days, and a file of somebody else."""
    for name, content, days in (
        ("runs/old/block-00000.safetensors", b"x" * 1000, 40),
        ("runs/new/block-00000.safetensors", b"x" * 2000, 1),
        ("tuning/one/state", b"x" * 10, 29),
        ("unpickled-1/model.safetensors", b"x" * 3000, 90),
        ("compare/row/row-1.json", b"{}", 2),
        ("compare/speeds-1.json", b"{}", 2),
        ("rescued-1/out/model", b"x", 50),
        ("mine.txt", b"x", 90),
    ):
        file = own_cache / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        os.utime(file, (time.time() - days * DAY,) * 2)
    return own_cache


def run(*arguments: str, given: str | None = None) -> str:
    done = CliRunner().invoke(app, ["cache", *arguments], input=given, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def told(*arguments: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(run(*arguments, "--json"))["entries"]
    return [each for each in entries if "smollm2" not in each["path"]]


def names(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != locks.LOCK}
    return {name for name in found if "smollm2" not in name}


def test_entries_have_kinds_sizes_and_ages(filled: Path) -> None:
    found = [(each["kind"], Path(each["path"]).name, each["nbytes"], each["abandoned"]) for each in told()]
    assert found == [
        ("runs", "old", 1000, True),
        ("runs", "one", 10, False),
        ("runs", "new", 2000, False),
        ("models", "unpickled-1", 3000, False),
        ("comparisons", "row", 2, False),
        ("comparisons", "speeds-1.json", 2, False),
        ("rescued", "rescued-1", 1, False),
    ]
    assert [round(each["age"] / DAY) for each in told()] == [40, 29, 1, 90, 2, 2, 50]  # to look changes no age


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("abandoned", {"runs/old/block-00000.safetensors"}),
        (
            "runs",
            {"runs/old/block-00000.safetensors", "runs/new/block-00000.safetensors", "tuning/one/state"},
        ),
        ("comparisons", {"compare/row/row-1.json", "compare/speeds-1.json"}),
        ("rescued", {"rescued-1/out/model"}),
    ],
)
def test_one_kind_is_deleted_and_nothing_else(kind: str, gone: set[str], filled: Path) -> None:
    before = names(filled)
    run("--clear", kind)
    assert before - names(filled) == gone


def test_all_spares_results_and_files_of_others(filled: Path) -> None:
    run("--clear", "all")
    assert names(filled) == {"rescued-1/out/model", "mine.txt"}


def test_what_a_process_uses_stays(filled: Path) -> None:
    held = locks.hold(filled / "runs" / "old")
    assert held is not None
    assert [each["in_use"] for each in told()] == [True, *[False] * 6]
    assert not any(each["abandoned"] for each in told())
    assert "is in use by a running process and stays" in " ".join(run("--clear", "runs").split())
    assert (filled / "runs/old/block-00000.safetensors").exists()
    assert not (filled / "runs/new").exists()
    held.release()


@pytest.mark.parametrize("yes", [True, False])
def test_abandoned_runs_are_offered(yes: bool, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "`fewbit cache --clear abandoned`" in run()
    assert (filled / "runs/old").exists()

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(command, "sys", type("Sys", (), {"stdin": Terminal(), "stdout": Terminal()}))
    assert "1 run was not continued for a month. Delete?" in run(given="y\n" if yes else "n\n")
    assert (filled / "runs/old").exists() is not yes
    assert (filled / "runs/new").exists()


def test_a_label_says_which_model_an_entry_is_of(filled: Path) -> None:
    before = told()
    kept.label(filled / "runs/new", "./my model", "blocks quantized by gptq-4bit")
    kept.label(filled / "compare/speeds-1.json", "org/other", "speeds of plans")
    after = told()
    same = ("path", "nbytes", "abandoned")
    assert [[each[key] for key in same] for each in after] == [[each[key] for key in same] for each in before]
    assert [round(each["age"] / DAY) for each in after] == [round(each["age"] / DAY) for each in before]
    labels = {Path(each["path"]).name: (each["model"], each["holds"]) for each in after if each["model"]}
    assert labels == {
        "new": ("./my model", "blocks quantized by gptq-4bit"),
        "speeds-1.json": ("org/other", "speeds of plans"),
    }
    shown = run()
    assert "./my model" in shown
    assert "runs/old" in shown
    assert "runs/new" not in shown
    run("--clear", "all")
    assert names(filled) == {"rescued-1/out/model", "mine.txt"}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}'])
def test_a_damaged_label_is_none(content: str, filled: Path) -> None:
    (filled / "runs/new/.about.json").write_text(content, encoding="utf-8")
    assert [(each["model"], each["holds"]) for each in told()] == [("", "")] * 7


def test_the_cache_keeps_only_kinds_that_are_listed(own_cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "a").write_bytes(b"12345")

    made("unpickled-2", make)
    assert [(each["kind"], Path(each["path"]).name) for each in told()] == [("models", "unpickled-2")]


def test_every_folder_that_the_code_names_is_an_entry() -> None:
    """Each name that a module of fewbit puts behind cache_folder() is one of `kept`'s patterns."""
    import re

    import fewbit

    patterns = {pattern.split("/")[0].rstrip("*-") for _, pattern in kept._FOUND}
    used = set()
    for file in Path(fewbit.__file__).parent.rglob("*.py"):
        used |= set(re.findall(r'cache_folder\(\) / f?"([a-z-]+)', file.read_text(encoding="utf-8")))
    assert used >= {"runs", "tuning", "compare", "merged", "on-load"}
    assert used <= patterns


def test_costs_of_widths_are_entries(own_cache: Path) -> None:
    (own_cache / "costs").mkdir()
    (own_cache / "costs" / "one.json").write_text("{}", encoding="utf-8")
    assert [(each["kind"], each["nbytes"]) for each in told()] == [("costs", 2)]
    run("--clear", "costs")
    assert told() == []


def test_an_entry_that_another_process_has_just_deleted_is_none(own_cache: Path) -> None:
    assert kept._entry("costs", own_cache / "costs" / "gone.json", time.time()) is None
