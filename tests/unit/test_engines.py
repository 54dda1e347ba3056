"""Engines of others: their commands, what they cannot serve, and that they take the place of the process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewbit.advise import engines
from fewbit.advise.rules import rules
from fewbit.api import serve
from fewbit.errors import PlanError
from fewbit.models.loading import Loading
from fewbit.serving.settings import ENGINES, Serving
from fewbit.system import machine
from tests import gguf_files

HOPPER = (9, 0)


def test_every_engine_can_be_named() -> None:
    assert ("fewbit", *engines.engines()) == ENGINES


def test_options_in_the_spelling_of_the_engine() -> None:
    given = {"host": "0.0.0.0", "port": 9, "name": "m", "context": 512, "requests": 4}
    vllm = engines.started("vllm", "a b", {**given, "remote_code": True, "api_key": "secret"})
    assert vllm.arguments == (
        *("vllm", "serve", "a b", "--host", "0.0.0.0", "--port", "9", "--served-model-name", "m"),
        *("--max-model-len", "512", "--max-num-seqs", "4", "--trust-remote-code"),
    )
    assert vllm.environment == {"VLLM_API_KEY": "secret"}
    assert str(vllm).startswith("VLLM_API_KEY=\"$VLLM_API_KEY\" vllm serve 'a b' --host")
    assert "secret" not in str(vllm) + repr(vllm)
    llama = engines.started("llama.cpp", "x.gguf", given)
    assert llama.arguments == (
        *("llama-server", "-m", "x.gguf", "--host", "0.0.0.0", "--port", "9", "--alias", "m"),
        *("--ctx-size", "2048", "--parallel", "4"),  # the requests share it
    )
    alone = engines.started("llama.cpp", "x.gguf", {"context": 512, "requests": None})
    assert alone.arguments[3:] == ("--ctx-size", "512", "--parallel", "1")
    whole = engines.started("llama.cpp", "x.gguf", {"context": None, "requests": 4})
    assert whole.arguments[3:] == ("--kv-unified", "--parallel", "4")
    assert engines.started("vllm", "m").arguments == ("vllm", "serve", "m")


@pytest.mark.parametrize("format", [None, *rules()["targets"]["vllm"]["formats"]])
def test_what_vllm_serves(format: str | None) -> None:
    assert engines.why_not("vllm", format, HOPPER) is None
    assert engines.why_not("vllm", format, (7, 5)) is None


@pytest.mark.parametrize(
    ("engine", "format", "capability", "words"),
    [
        ("vllm", "gguf", HOPPER, "not gguf"),
        ("vllm", "gptq", None, "needs an NVIDIA GPU"),
        ("vllm", "gptq", (7, 0), "compute capability 7.5, and this one has 7.0"),
        ("llama.cpp", "gptq", None, "reads gguf, not gptq"),
        ("llama.cpp", None, HOPPER, "not quantized"),
    ],
)
def test_what_they_cannot(engine: str, format: str | None, capability: tuple[int, int] | None, words: str) -> None:
    assert words in (engines.why_not(engine, format, capability) or "")


def test_llama_cpp_serves_gguf_anywhere() -> None:
    assert engines.why_not("llama.cpp", "gguf", None) is None


FAKE = """#!{python}
import json, os, signal, sys, time
if "fewbit-wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("ready", flush=True)
    time.sleep(60)
print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("LLAMA_API_KEY")]))
sys.exit(3)
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return gguf_files.written(gguf_files.save(folder / "model", "llama"), folder / "tiny.gguf")


def command(model: Path, path: str, *options: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "fewbit", "serve", str(model), "--engine", "llama.cpp", *options]
    environment = {**os.environ, "PATH": path, "FEWBIT_API_KEY": "k3y"}
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_the_engine_takes_the_place_of_the_process(gguf: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(FAKE.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    ran = command(gguf, str(tmp_path), "--port", "8123")
    out, told = ran.communicate(timeout=120)
    assert ran.returncode == 3
    pid, arguments, key = json.loads(out)
    assert (pid, key) == (ran.pid, "k3y")
    assert arguments == ["-m", str(gguf), "--host", "127.0.0.1", "--port", "8123", "--alias", "tiny.gguf"]
    assert "llama-server -m" in told
    assert "k3y" not in told
    waiting = command(gguf, str(tmp_path), "--served-model-name", "fewbit-wait")
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "ready\n"
    waiting.send_signal(signal.SIGTERM)
    waiting.communicate(timeout=120)
    assert waiting.returncode == 7


def refused(model: Path | str, engine: str = "llama.cpp", loading: Loading = Loading(), **options: Any) -> str:
    with pytest.raises(PlanError) as error:
        serve.hand_over(model, loading, Serving(engine=engine, **options), print)
    return str(error.value)


def test_what_is_not_installed_is_said_with_the_command(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(gguf.parent))
    said = refused(gguf)
    assert "llama.cpp is not installed: there is no program llama-server on PATH" in said
    assert f"llama-server -m {gguf} --host 127.0.0.1 --port 8000" in said


def test_a_folder_named_by_a_dot_has_its_own_name(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(gguf.parent))
    (tmp_path / "out" / "inside").mkdir(parents=True)
    shutil.copy(gguf, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out" / "inside")
    for given in ("..", f"{tmp_path / 'out'}/", "../../out/."):
        assert "--alias out" in refused(given)
    assert "--alias tiny.gguf" in refused("../tiny.gguf")
    monkeypatch.chdir(tmp_path / "out")
    assert "--alias out" in refused(".")


def test_what_it_cannot_serve_is_said_before(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(gguf.parent))
    assert "vllm reads gptq" in refused(gguf, "vllm")
    assert "this model is not quantized" in refused(gguf.parent / "model")
    assert "needs an NVIDIA GPU" in refused(gguf.parent / "model", "vllm") or machine.gpu_capability() is not None


def test_options_of_fewbit_alone_are_an_error(gguf: Path) -> None:
    assert "`kernel, max_queue`: not an option of llama.cpp" in refused(
        gguf, loading=Loading(kernel="cpu"), max_queue=3
    )
    assert "`trust_remote_code`" in refused(gguf, loading=Loading(trust_remote_code=True))
