"""The scripts of examples/scripts run on tiny, and are short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fewbit

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "scripts"


def run(name: str, *arguments: object, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_awq_model_becomes_a_gguf_file(tmp_path: Path) -> None:
    def quantized(scheme: str) -> None:
        plan = {"name": "a", "format": "awq", "rules": [{"match": "*", "scheme": scheme}]}
        fewbit.quantize("tiny", tmp_path / scheme, plan=plan)

    quantized("int4-g32-sym")
    assert run("awq_to_gguf.py", "int4-g32-sym", "exact.gguf", folder=tmp_path).startswith("the same values\n")
    quantized("int4-g128")
    lines = run("awq_to_gguf.py", "int4-g128", "again.gguf", folder=tmp_path).splitlines()
    assert lines[0].startswith("not exact: ")
    assert 0 < float(lines[1].rpartition(" ")[2]) < 0.1


def test_plans_are_compared_in_pandas(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    lines = run("compare_with_pandas.py", "tiny", "rtn-4bit", folder=tmp_path).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["bf16", "rtn-4bit"]


def test_a_served_model_is_asked(tmp_path: Path) -> None:
    for package in ("fastapi", "openai"):
        pytest.importorskip(package)
    assert run("serve_and_call.py", "tiny", folder=tmp_path).strip()


def test_each_script_is_short_and_is_run_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    for script in SCRIPTS.glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 40, script.name
        assert f'"{script.name}"' in here
