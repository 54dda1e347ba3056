"""Runs each task in its own process, so that its memory and its crashes do not affect other tasks.

A server process imports once what every task needs. It reads tasks as lines of JSON and forks for each one. So a task
starts in milliseconds, every task starts from the same memory, and a killed task loses only its own result. Forking is
reliable on Linux only; on other systems each task gets its own server. The server's answers are lines of JSON too: the
task's process id, its progress, its result, and its exit status.
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

OnMessage = Callable[[Mapping[str, Any]], None]
Task = Callable[[Mapping[str, Any], OnMessage], Mapping[str, Any]]

_FORKS = sys.platform == "linux"
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CPU or a GPU. PyTorch raises a plain RuntimeError for the former."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


class Failed(Exception):
    """A task failed. The message says why."""


class Server:
    """A context manager that runs tasks, one at a time, in processes of `module`, which must call `serve`."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def run(self, task: Mapping[str, Any], on_message: OnMessage) -> dict[str, Any]:
        """Run a task and return its result. `on_message` receives {"pid": ...}, then progress messages.

        Failed if the task fails."""
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
            except ValueError:  # truncated because the process was killed
                continue
            if "status" in said:
                return _outcome(result, said["status"])
            if "result" in said or "error" in said:
                result = said
            else:
                on_message(said)
        return _outcome(result, self.process.wait())

    def stop(self) -> None:
        """Kill the server and the task that it still runs."""
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
            start_new_session=True,  # Ctrl-C reaches only the caller, which stops the server
        )


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package.

    -P keeps the working directory off the import path: a folder named torch in it must not be imported.
    """
    return [sys.executable, "-P", "-W", "ignore", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """The environment of such a process: it imports the same copy of the package, and is no rank of torchrun's."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    return {**inherited, "PYTHONPATH": path}


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
    """The server loop: for each line, run the task named by its "do". `prepare` is called once with the first line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # send prints to stderr, so that they do not mix with the answers
    _end_with_parent()
    prepared = False
    for line in sys.stdin:
        asked = json.loads(line)
        if not prepared:
            try:
                prepare(asked)
            except Exception:  # the task will hit the same error and report it
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
        answers.write("\n")  # ends a line that a killed process left unfinished
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
    """An exception in one line. For an unexpected one, also the file and line where it was raised."""
    if is_out_of_memory(error):
        return f"out of memory: {first_line(str(error)) or 'an allocation failed'}"
    if isinstance(error, FewbitError):
        said = [line.strip() for line in error.message.splitlines()]
        more = f"; and {len(said) - 2} more" if len(said) > 2 else ""  # a list of all tensors does not fit on a line
        return " ".join(said[:2]) + more
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(str(error))}{where}"


def first_line(text: str, most: int = 300) -> str:
    """The first line of `text` that is not blank, cut to `most` characters."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:most]


def _end_with_parent() -> None:
    """Make the system kill this process when its parent ends, even if the parent crashes (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
