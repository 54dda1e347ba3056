"""What a release needs is in one place, or agrees."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from make_dist import faults

import fewbit

ROOT = Path(__file__).resolve().parents[2]
MODULE = "fewbit/__init__.py"
LIBRARY = "fewbit/native/fewbit_cpu.so"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def test_the_version_is_in_one_place() -> None:
    found = project()
    assert "version" not in found["project"]
    assert found["project"]["dynamic"] == ["version"]
    source = read(found["tool"]["scikit-build"]["metadata"]["version"]["input"])
    assert re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE) == [fewbit.__version__]
    assert "version" not in yaml.safe_load(read("CITATION.cff"))


def test_pre_commit_has_the_pinned_ruff() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert f"ruff=={repository['rev'].removeprefix('v')}" in read("constraints.txt").splitlines()


def test_the_workflow_runs_what_must_pass() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": ".ci/run"}


def test_the_checklist_has_ten_lines() -> None:
    assert len(re.findall(r"^\d+\. ", read("docs/release.md"), re.MULTILINE)) == 10


def test_the_check_of_a_native_wheel_is_valid() -> None:
    command = project()["tool"]["cibuildwheel"]["test-command"]
    code = re.fullmatch(r'python -c "(.*); assert (\S+\(\)), \S+\(\)"', command)
    assert code is not None
    subprocess.run([sys.executable, "-c", f"{code[1]}; assert isinstance({code[2]}, str)"], check=True)


def release(folder: Path, sdist: list[str], pure: list[str], native: list[str]) -> list[str]:
    """The faults of a release whose files hold these names."""
    files = [folder / f"fewbit-1-py3-none-{tag}.whl" for tag in ("any", "manylinux_2_28_x86_64")]
    for file, inside in zip(files, (pure, native), strict=True):
        with zipfile.ZipFile(file, "w") as wheel:
            for name in inside:
                wheel.writestr(name, "")
    with tarfile.open(folder / "fewbit-1.tar.gz", "w:gz") as archive:
        for name in sdist:
            archive.addfile(tarfile.TarInfo(f"fewbit-1/{name}"))
    return list(faults([*files, folder / "fewbit-1.tar.gz"]))


def test_a_sound_release_has_no_faults(tmp_path: Path) -> None:
    assert release(tmp_path, [f"src/{MODULE}", "README.md"], [MODULE], [MODULE, LIBRARY]) == []


@pytest.mark.parametrize(
    ("sdist", "pure", "native", "fault"),
    [
        ([f"src/{LIBRARY}"], [LIBRARY], [LIBRARY], "fewbit-1.tar.gz: holds the libraries"),
        ([], [LIBRARY], [LIBRARY], "any.whl: holds the libraries"),
        ([f"src/{MODULE}"], [MODULE], [MODULE], r"x86_64.whl: holds the libraries \[\]"),
        ([f"src/{MODULE}"], [], [MODULE, LIBRARY], f"any.whl: lacks {MODULE}"),
    ],
)
def test_a_faulty_release_is_found(tmp_path: Path, sdist: Any, pure: Any, native: Any, fault: str) -> None:
    found = release(tmp_path, sdist, pure, native)
    assert any(re.search(fault, line) for line in found), found
