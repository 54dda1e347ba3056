"""Tasks in processes of their own: what they answer, and what is said of those that do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit.system.processes import Failed, Server

TASKS = """
import os, signal, sys
from fewbit.errors import PlanError
from fewbit.system.processes import serve

prepared = []

def add(task, heard):
    print("noise")
    heard({"at": task["a"]})
    return {"sum": task["a"] + task["b"], "prepared": len(prepared), "pid": os.getpid()}

def refuse(task, heard):
    raise PlanError("this cannot\\n  be\\n  be\\n  be", "hint")

def fail(task, heard):
    raise {"memory": MemoryError(), "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
           "bug": ValueError("what?\\nmore")}[task["how"]]

def end(task, heard):
    sys.stderr.flush()
    os._exit(3) if task["how"] == "exit" else os.kill(os.getpid(), getattr(signal, task["how"]))

if __name__ == "__main__":
    serve({"add": add, "refuse": refuse, "fail": fail, "end": end}, lambda task: prepared.append(task))
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "few_tasks.py").write_text(TASKS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Server("few_tasks") as started:
        yield started


def test_a_task_answers_from_a_process_of_its_own(server: Server) -> None:
    said: list[Any] = []
    first = server.run({"do": "add", "a": 1, "b": 2}, said.append)
    second = server.run({"do": "add", "a": 3, "b": 4}, said.append)
    assert (first["sum"], second["sum"]) == (3, 7)
    assert first["prepared"] == second["prepared"] == 1  # once, before both
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert said == [{"pid": first["pid"]}, {"at": 1}, {"pid": second["pid"]}, {"at": 3}]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"do": "refuse"}, "this cannot be; and 2 more"),
        ({"do": "fail", "how": "memory"}, "out of memory: an allocation failed"),
        ({"do": "fail", "how": "allocator"}, "out of memory: DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        ({"do": "fail", "how": "bug"}, "ValueError: what? (few_tasks.py:17)"),
        ({"do": "end", "how": "exit"}, "its process ended with exit code 3"),
        ({"do": "end", "how": "SIGKILL"}, "its process was killed by SIGKILL, most often because memory ran out"),
        ({"do": "end", "how": "SIGTERM"}, "its process was killed by SIGTERM"),
    ],
)
def test_a_task_that_fails_says_why_and_the_next_one_runs(server: Server, task: dict[str, Any], reason: str) -> None:
    with pytest.raises(Failed) as failed:
        server.run(task, lambda said: None)
    assert str(failed.value) == reason
    assert server.run({"do": "add", "a": 1, "b": 1}, lambda said: None)["sum"] == 2


def test_a_server_that_is_gone_is_started_again(server: Server) -> None:
    assert server.run({"do": "add", "a": 1, "b": 1}, lambda said: None)["sum"] == 2
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    assert server.run({"do": "add", "a": 1, "b": 1}, lambda said: None)["sum"] == 2


def test_one_that_cannot_start_says_so() -> None:
    with Server("no_module_of_that_name") as server, pytest.raises(Failed, match="ended with exit code 1"):
        server.run({"do": "add", "a": 1, "b": 1}, lambda said: None)
