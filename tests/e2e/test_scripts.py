"""The scripts of examples/scripts run on tiny, and are short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fewbit
from tests import models
from tests.e2e.test_ranks import device_for
from tests.hub import TOKEN, Hub, running

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "scripts"


def run(name: str, *arguments: object, folder: Path, by: tuple[str, ...] = (), there: Hub | None = None) -> str:
    """What the script prints. by: the arguments of Python that start it, as a module that launches scripts.

    there: the Hub that it finds.
    """
    hub = {"HF_ENDPOINT": there.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"} if there else {}
    done = subprocess.run(
        [sys.executable, *by, str(SCRIPTS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **hub},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_awq_model_becomes_a_gguf_file(tmp_path: Path) -> None:
    def quantized(scheme: str) -> None:
        plan = {"name": "a", "format": "awq", "rules": [{"match": "*", "scheme": scheme}]}
        fewbit.quantize("tiny", tmp_path / scheme, plan=plan)

    quantized("int4-g32-sym")
    assert run("awq_to_gguf.py", "int4-g32-sym", "exact.gguf", folder=tmp_path).startswith("the same values\n")
    quantized("int4-g16")
    lines = run("awq_to_gguf.py", "int4-g16", "again.gguf", folder=tmp_path).splitlines()
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


def test_a_quantized_model_is_pushed(tmp_path: Path) -> None:
    with running() as there:
        lines = run("quantize_and_push.py", "tiny", "org/tiny-nf4", folder=tmp_path, there=there).splitlines()
    assert lines[0].startswith("the same most likely token at ")
    assert lines[1].startswith(f"{there.endpoint}/org/tiny-nf4/commit/")
    place = there.repositories["org/tiny-nf4"]
    assert place.private
    assert place.files["model.safetensors"] == (tmp_path / "tiny-nf4" / "model.safetensors").read_bytes()
    assert "KL divergence" in place.files["README.md"].decode()


def test_adapters_are_trained_on_packed_experts(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    models.save(
        tmp_path / "moe", "mistral", kind="Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    )
    questions = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "Grass is", "completion": " green."}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    lines = run("qlora_on_moe.py", "moe", data, "adapter", folder=tmp_path).splitlines()
    assert lines[0] == "24 of 32 adapted linears are of experts"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert fewbit.inspect(tmp_path / "adapter-base").schemes.keys() == {"nf4-b64-dq"}


def test_two_processes_quantize_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's launcher starts processes as torchrun does. Without two GPUs, each uses a core."""
    if device_for(2) == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    printed = run("several_gpus.py", "tiny", "out", 2, folder=tmp_path, by=launcher)
    assert printed.startswith("2 processes: KL divergence 0.0")
    assert fewbit.inspect(tmp_path / "out").schemes == {"int4-g128-sym": 56}


def test_each_script_is_short_and_is_run_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    for script in SCRIPTS.glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 40, script.name
        assert f'"{script.name}"' in here
