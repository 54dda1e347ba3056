"""Working folders: one living process each, what ended processes left is found or removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from fewbit.pipeline.run import Run
from fewbit.system import locks


def test_a_folder_belongs_to_one_until_it_is_released(tmp_path: Path) -> None:
    held = locks.hold(tmp_path / "run")
    assert held is not None
    assert locks.hold(tmp_path / "run") is None
    held.release()
    again = locks.hold(tmp_path / "run")
    assert again is not None
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from fewbit.system import locks\n"
    code += "held = locks.resumable(Path(sys.argv[1]) / 'run'); (held.folder / 'block').touch()\n"
    code += "locks.scratch(Path(sys.argv[1]) / 'on-load'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    found = locks.resumable(tmp_path / "run")
    assert found.folder == tmp_path / "run"
    assert (found.folder / "block").exists()
    held = locks.scratch(tmp_path / "on-load")
    assert sorted(os.listdir(tmp_path)) == sorted([held.folder.name, "run"])


def test_a_second_run_works_apart_and_the_fullest_is_resumed(tmp_path: Path) -> None:
    first = locks.resumable(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"another process does the same work, in .*run: .* in run-2"):
        second = locks.resumable(tmp_path / "run")
    assert second.folder == tmp_path / "run-2"
    (second.folder / "block").touch()
    first.release()
    second.release()
    assert locks.resumable(tmp_path / "run").folder == tmp_path / "run-2"
    assert os.listdir(tmp_path) == ["run-2"]


def test_without_locks_a_folder_is_its_makers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    first = locks.resumable(tmp_path / "run")
    with pytest.warns(UserWarning, match="another process"):
        second = locks.resumable(tmp_path / "run")
    assert [first.folder.name, second.folder.name] == ["run", "run-2"]
    scratch = locks.scratch(tmp_path / "on-load")
    assert locks.scratch(tmp_path / "on-load").folder != scratch.folder
    assert scratch.folder.exists()


def test_who_waits_for_another_process_says_so(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fewbit.system import locks\n"
    code += "with locks.alone(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdout.readline()
    said: list[bool] = []

    def waiting() -> None:
        said.append(other.poll() is None)
        other.communicate()  # closes its stdin, so it ends

    with locks.alone(tmp_path, waiting):
        assert said == [True]
        assert other.returncode == 0
    with locks.alone(tmp_path, waiting):
        assert len(said) == 1


def test_a_run_forgets_the_folder_that_it_used(own_cache: Path) -> None:
    with Run("same", "llama", "blocks") as first:
        first.save(0, {}, [])
        with pytest.warns(UserWarning, match="another process does the same work"):
            second = Run("same", "llama", "blocks")
        with second:
            second.save(0, {}, [])
        assert len(list((own_cache / "runs").iterdir())) == 2
        second.forget()
    assert [each.name for each in (own_cache / "runs").iterdir()] == ["same"]
    first.forget()
    assert list((own_cache / "runs").iterdir()) == []
