"""The build of fewbit: scikit-build-core's, and where there is no compiler, or it fails, the same package without C++.

An editable install has the library beside the sources (`src/fewbit/native/`), built in `build/native`.
`FEWBIT_NATIVE=require` makes a failure an error, for wheels; `FEWBIT_NATIVE=no` builds nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as core
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

Settings = dict[str, Any] | None
_WANTED = os.environ.get("FEWBIT_NATIVE", "")
_COMPILERS = ("c++", "g++", "clang++")


def build_wheel(directory: str, settings: Settings = None, metadata: str | None = None) -> str:
    """A wheel with the library, or a pure one."""
    if _possible():
        try:
            return core.build_wheel(directory, {**(settings or {}), **_required()}, metadata)
        except (Exception, SystemExit) as error:  # whatever CMake, ninja or a compiler stumbled over
            _gave_up(error)
    # A library that an editable install put beside the sources is not for every machine.
    return core.build_wheel(directory, {**(settings or {}), "wheel.cmake": "false", "wheel.exclude": "*.so"}, metadata)


def build_editable(directory: str, settings: Settings = None, metadata: str | None = None) -> str:
    """A wheel that points here, where the library is put if it can be built."""
    if _possible():
        try:
            _build_here()
        except (OSError, subprocess.CalledProcessError) as error:
            _gave_up(error)
    pure = {**(settings or {}), "wheel.cmake": "false", "editable.mode": "inplace"}
    return core.build_editable(directory, pure, metadata)


def get_requires_for_build_wheel(settings: Settings = None) -> list[str]:
    """CMake and ninja, where there is a compiler to use and they are missing."""
    return core.get_requires_for_build_wheel(settings) if _possible() else []


get_requires_for_build_editable = get_requires_for_build_wheel


def _build_here() -> None:
    root = Path(__file__).parents[1]
    build, library = root / "build" / "native", root / "src" / "fewbit" / "native" / "fewbit_cpu.so"
    library.unlink(missing_ok=True)
    shutil.rmtree(build, ignore_errors=True)  # a cache of a CMake that is gone
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    required = [f"-D{name.removeprefix('cmake.define.')}={value}" for name, value in _required().items()]
    for command in (
        ["cmake", "-S", str(root), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *generator, *required],
        ["cmake", "--build", str(build), "--parallel"],
        ["cmake", "--install", str(build), "--prefix", str(root / "src")],
    ):
        subprocess.run(command, check=True)


def _required() -> dict[str, str]:
    return {"cmake.define.FEWBIT_NATIVE_REQUIRED": "ON"} if _WANTED == "require" else {}


def _possible() -> bool:
    """Whether there is a compiler to try."""
    asked = shlex.split(os.environ.get("CXX", ""))[:1]
    return _WANTED == "require" or (_WANTED != "no" and any(map(shutil.which, asked or _COMPILERS)))


def _gave_up(error: BaseException) -> None:
    if _WANTED == "require":
        raise error
    print(f"fewbit: the CPU library was not built ({error}); what is installed works without it", file=sys.stderr)
