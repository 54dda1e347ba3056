"""`fewbit estimate` and `fewbit recommend` from the command line, and estimates held to what quantizing writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbit as package
from fewbit.plans import plan
from tests.e2e.conftest import Fewbit

QUICK = ("gptq-4bit", "awq-4bit", "nf4", "int8", "q4_k_m")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in plan.PRESETS]


@pytest.mark.parametrize("name", EACH)
def test_estimated_bytes_are_those_that_are_written(name: str, tmp_path: Path) -> None:
    """Rounding to nearest, which needs no text: a method changes no size."""
    wanted = plan.find(name)
    out = tmp_path / ("out.gguf" if wanted.format == "gguf" else "out")
    done = package.quantize("tiny", out, plan=wanted.changed(method="rtn"))
    found = package.inspect(out)
    row = package.estimate("tiny", plan=wanted.changed(method="rtn")).plans[1]
    assert row.file_bytes == done.output_bytes == found.file_bytes
    assert row.weights_bytes == found.weights_bytes
    assert row.bits == pytest.approx(done.bits_per_weight, rel=0.01)
    itself = package.estimate(out)
    assert [r.weights_bytes for r in itself.plans] == [row.weights_bytes]


def test_estimate(fewbit: Fewbit) -> None:
    shown = fewbit("estimate", "tiny", "--context", 512, "--batch", 4, "--cache", "q8_0")
    assert shown.code == 0
    assert "4 x 512 tokens" in shown.out
    assert "gptq-4bit" in shown.out
    data = fewbit("estimate", "tiny", "--json").json
    assert [row["plan"] for row in data["plans"]][:2] == ["bf16", "rtn-4bit"]
    assert data["plans"][0]["weights_bytes"] == 14_688_768


def test_estimate_of_a_size(fewbit: Fewbit) -> None:
    shown = fewbit("estimate", "7B")
    assert all(words in shown.out for words in ("28 GB", "14 GB", "7 GB", "3.5 GB", "4.125"))
    assert fewbit("estimate", "70B", "--json").json["guide"][1]["nbytes"] == 140_000_000_000


def test_recommend(fewbit: Fewbit) -> None:
    shown = fewbit("recommend", "tiny", "--for", "serving", "--memory", "8GB", "--target", "vllm")
    assert shown.out.splitlines()[0] == "tiny, for serving, for vllm: gptq-4bit."
    assert shown.out.splitlines()[-1].strip() == "vllm serve tiny-gptq-4bit"
    assert ("This machine has no GPU, and plans for serving" in shown.out) != torch.cuda.is_available()
    shown = fewbit("recommend", "tiny", "--for", "edge", "--memory", "8GB", "--json")
    assert shown.json["plan"] == "q4_k_m"
    assert "has no GPU" not in shown.out
    assert "NF4" in fewbit("recommend", "--table").out  # a narrow terminal breaks the cell
    assert len(fewbit("recommend", "--table", "--json").json["methods"]) == 10


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("recommend", "tiny"), "needs a model and a purpose", 2),
        (("recommend", "tiny", "--for", "serving", "--speed", "last"), "Only --speed first", 2),
        (("recommend", "tiny", "--for", "quality", "--memory", "1MB"), "nothing fits 1 MB", 2),
        (("recommend", "tiny", "--for", "quality", "--report", "README.md"), "not a report of fewbit compare", 3),
        (("recommend", "tiny", "--for", "chat"), "unknown purpose 'chat'\n  Purposes: experiment (quick ", 2),
        (("estimate", "tiny", "--plan", "q4km"), "unknown plan", 2),
        (("estimate", "/nowhere"), "no such folder", 2),
        (("estimate", "7B", "--plan", "nf4"), "--plan nf4 is given with a size", 2),
        (("estimate", "7B", "--context", 8), "--context 8 is given with a size", 2),
    ],
)
def test_bad_requests(fewbit: Fewbit, arguments: tuple[str, ...], says: str, code: int) -> None:
    answer = fewbit(*arguments)
    assert says in answer.err
    assert answer.code == code
