"""Tasks in processes of their own: what one holds, and how it ends, is nobody else's.

A server imports what every task needs, once, and forks for each one that comes as a line of JSON. So a task starts in
milliseconds and yet from the same memory as all others, and a task that is killed costs one answer. Where forking is
not sound (elsewhere than on Linux) each task gets a server of its own. The server's answers are lines too: the process
of a task, its progress, its result, and how it ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from fewbit.errors import FewbitError

Heard = Callable[[Mapping[str, Any]], None]
Task = Callable[[Mapping[str, Any], Heard], Mapping[str, Any]]

_FORKS = sys.platform == "linux"
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


class Failed(Exception):
    """A task that did not end as it should; says why."""


class Server:
    """The processes of `module`, which calls `serve`: a context in which tasks can be run, one at a time."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def run(self, task: Mapping[str, Any], heard: Heard) -> dict[str, Any]:
        """What the task gives; `heard` is told {"pid"} and whatever else it says before. Failed if it ended badly."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.process = self._started()
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answers is not None
        try:
            asked.write(json.dumps(task) + "\n")
            asked.flush()
        except BrokenPipeError:
            raise Failed(f"its process could not start: {_ending(self.process.wait())}") from None
        result: dict[str, Any] | None = None
        for line in answers:
            try:
                said: dict[str, Any] = json.loads(line)
            except ValueError:  # cut off where a process was killed
                continue
            if "status" in said:
                return _outcome(result, said["status"])
            if "result" in said or "error" in said:
                result = said
            else:
                heard(said)
        return _outcome(result, self.process.wait())

    def stop(self) -> None:
        """End the server and what it still runs."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.process = None

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(self.module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=environment(),
            start_new_session=True,  # an interruption is the caller's, who ends the server
        )


def command(module: str, *arguments: str) -> list[str]:
    """How to run a module of this package. -P: a folder called torch in the working directory is not imported."""
    return [sys.executable, "-P", "-W", "ignore", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """The environment of such a process: it imports the package that starts it, installed or not."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _outcome(result: Mapping[str, Any] | None, status: int) -> dict[str, Any]:
    if result is not None and "error" in result:
        raise Failed(result["error"])
    if result is None or status != 0:
        raise Failed(_ending(status))
    return dict(result["result"])


def _ending(status: int) -> str:
    if status >= 0:
        return f"its process ended with exit code {status}"
    name = signal.Signals(-status).name
    memory = ", most often because memory ran out" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{memory}"


def serve(tasks: Mapping[str, Task], prepare: Callable[[Mapping[str, Any]], None]) -> None:
    """The loop of a server: run the task that each line names as "do". `prepare` sees the first line beforehand."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever is printed is no answer
    _end_with_parent()
    prepared = False
    for line in sys.stdin:
        asked = json.loads(line)
        if not prepared:
            try:
                prepare(asked)
            except Exception:  # the task will meet it again, and say so
                traceback.print_exc()
            prepared = True
        if not _FORKS:
            _say(answers, {"pid": os.getpid()})
            _run(tasks, asked, answers)
            _say(answers, {"status": 0})
            return
        answers.flush()
        pid = os.fork()
        if not pid:
            _end_with_parent()
            _say(answers, {"pid": os.getpid()})
            _run(tasks, asked, answers)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        answers.write("\n")  # a line that a killed process began ends here
        _say(answers, {"status": os.waitstatus_to_exitcode(status)})


def _run(tasks: Mapping[str, Task], asked: Mapping[str, Any], answers: IO[str]) -> None:
    try:
        _say(answers, {"result": dict(tasks[asked["do"]](asked, lambda said: _say(answers, said)))})
    except BaseException as error:
        traceback.print_exc()
        _say(answers, {"error": why(error)})


def _say(answers: IO[str], said: Mapping[str, Any]) -> None:
    answers.write(json.dumps(said, allow_nan=False) + "\n")
    answers.flush()


def why(error: BaseException) -> str:
    """An exception in one line; for one that nobody raised on purpose, where it happened too."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return f"out of memory: {first_line(str(error)) or 'no more could be had'}"
    if isinstance(error, FewbitError):
        said = [line.strip() for line in error.message.splitlines()]
        more = f"; and {len(said) - 2} more" if len(said) > 2 else ""  # a list of all tensors is no line
        return " ".join(said[:2]) + more
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(str(error))}{where}"


def first_line(text: str, most: int = 300) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:most]


def _end_with_parent() -> None:
    """Ask the system to end this process when the one that started it ends, however that does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
