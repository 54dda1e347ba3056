"""Triton's interpreter, in which Triton kernels run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.limits import HANG


def run(module: str) -> Any:
    """The JSON that `python -m module` prints in the interpreter.

    It is a process of its own, because Triton reads the variable when a kernel is imported.
    """
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "src"), *sys.path])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
