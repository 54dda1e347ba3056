"""Run another tool with fewbit active in its processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import resources
from typing import Annotated

import typer

from fewbit.errors import PlanError


def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND", help="The command with its arguments. Write -- before it."),
    ],
) -> None:
    """Run a Python tool with fewbit active, so that it loads packed models, as in fewbit run -- lm_eval --model hf.

    Works for console scripts, `python -m module` and `python file.py`, and for the Python processes that they start.
    Each of them acts as if its first line were `import fewbit`.
    """
    # The commands of this Python's environment come first, also if it was not activated.
    path = os.pathsep.join(filter(None, (os.path.dirname(sys.executable), os.environ.get("PATH"))))
    program = shutil.which(command[0], path=path)
    if program is None:
        raise PlanError(
            f"{command[0]}: no such command in this environment",
            "Install the tool in the environment of fewbit, or give its module: fewbit run -- python -m MODULE.",
        )
    start = str(resources.files("fewbit") / "data" / "run")
    python_path = os.pathsep.join(filter(None, (start, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": python_path}
    if os.name == "nt":  # exec would return to the shell before the command has ended
        raise typer.Exit(subprocess.run([program, *command[1:]], env=environment).returncode)
    sys.stdout.flush()
    os.execve(program, [program, *command[1:]], environment)
