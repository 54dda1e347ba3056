"""`fewbit run` starts other tools with fewbit active; the shell completes commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses a Unix shell")

ACTIVE = "import sys; print('fewbit' in sys.modules, 'torch' in sys.modules, *sys.argv[1:])"


def run(*command: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fewbit", *before, "run", *command],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


def test_fewbit_is_active_and_arguments_arrive_as_they_are() -> None:
    done = run("--", "python", "-c", ACTIVE, "--debug", "-h", "--", "--json")
    assert (done.returncode, done.stdout) == (0, "True False --debug -h -- --json\n")
    assert run("python", "-c", ACTIVE, "--debug", before=("--debug",)).stdout == "True False --debug\n"


def test_processes_that_the_tool_starts_have_it_too() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ACTIVE!r}])"
    assert run("--", "python", "-c", code).stdout == "True False\n"
    assert run("--", "sh", "-c", f'python -c "{ACTIVE}"').stdout == "True False\n"


def test_settings_of_fewbit_s_own_commands_do_not_reach_the_tool() -> None:
    code = "import os; print(sorted({'TRANSFORMERS_VERBOSITY', 'GOMP_SPINCOUNT'} & set(os.environ)))"
    ours = ("TRANSFORMERS_VERBOSITY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        [sys.executable, "-m", "fewbit", "run", "--", "python", "-c", code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
    )
    assert done.stdout == "[]\n"


def test_the_exit_code_is_the_command_s() -> None:
    assert run("--", "python", "-c", "raise SystemExit(7)").returncode == 7


def test_the_environment_s_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.argv_seen = True\n", encoding="utf-8")
    code = "import sys, sitecustomize; print(sys.argv_seen, 'fewbit' in sys.modules)"
    assert run("--", "python", "-c", code, PYTHONPATH=str(tmp_path)).stdout == "True True\n"


def test_an_unknown_command_is_an_error() -> None:
    done = run("--", "no-such-tool")
    assert done.returncode == 2
    assert "no-such-tool: no such command in this environment" in done.stderr


def test_the_shell_completes_commands() -> None:
    environment = {"_FEWBIT_COMPLETE": "complete_bash", "COMP_WORDS": "fewbit qu", "COMP_CWORD": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "fewbit")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
    assert done.stdout.split() == ["quantize"]
