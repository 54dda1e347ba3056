"""Without the compiled CPU library packed weights compute slowly, and what loads them says so once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit.api import quantize
from tests import models

SAID = "the compiled CPU library is missing"
TWICE = """
import sys, warnings
warnings.simplefilter("always")
import fewbit
fewbit.prefer()
from transformers import AutoModelForCausalLM
{load}
{load}
"""
LOADS = {
    "load": "fewbit.load(sys.argv[1], device='cpu')",
    "generate": "fewbit.generate(sys.argv[1], 'a', max_new_tokens=2, device='cpu')",
    "from_pretrained": "AutoModelForCausalLM.from_pretrained(sys.argv[1])",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("missing") / "model", "llama")


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("missing") / "out"
    quantize.quantize(model, out, plan="nf4")
    return out


def said(library: str | None, *arguments: object) -> str:
    """What a Python process with this library says on stderr."""
    environment = {**os.environ, "FEWBIT_CPU_LIBRARY": library or ""}
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.parametrize("verb", LOADS)
def test_it_is_said_once_in_a_process(verb: str, quantized: Path) -> None:
    found = said("none", "-c", TWICE.format(load=LOADS[verb]), quantized)
    assert found.count(SAID) == 1
    assert "install fewbit from source where a C++ compiler is" in found


def test_compare_says_it_once(model: Path, quantized: Path, text: Path, own_cache: Path) -> None:
    flags = ("--text", text, "--samples", 2, "--length", 16, "--device", "cpu")
    found = said("none", "-m", "fewbit", "compare", model, "--plans", f"{quantized},rtn-4bit", *flags)
    assert found.count(SAID) == 1


def test_it_is_not_said_of_what_has_no_packed_weights(model: Path) -> None:
    assert SAID not in said("none", "-m", "fewbit", "generate", model, "a", "--max-new-tokens", 2, "--device", "cpu")


def test_it_is_not_said_where_the_library_is(quantized: Path) -> None:
    from fewbit.system import native

    if isinstance(native.library(), str):
        pytest.skip("the library was not built")
    assert SAID not in said(None, "-c", TWICE.format(load=LOADS["load"]), quantized)
