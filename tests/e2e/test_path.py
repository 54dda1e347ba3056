"""`fewbit doctor MODEL` says how the CPU computes a model, and why not faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.advise import doctor
from fewbit.api import quantize
from fewbit.plans.plan import Plan, find
from fewbit.system import native
from tests import architectures
from tests.e2e.conftest import Fewbit

pytestmark = [
    pytest.mark.skipif(isinstance(native.available(), str), reason="needs the compiled CPU library"),
    pytest.mark.usefixtures("rounded_activations"),
]


def quantized(root: Path, kind: str, plan: Plan | None = None) -> Path:
    quantize.quantize(architectures.save(root / kind, kind), root / "out", plan=plan or find("nf4"), device="cpu")
    return root / "out"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("bloom", "products", "it reads or returns more than one tensor"),
        ("qwen3_next", "products", "no attention of a known name among linear_attn"),
        ("gpt_oss", "whole blocks", "attention only: MLP of other products: router, experts"),
        ("deepseek_v2", "products", "latent attention (kv_a_proj_with_mqa, kv_b_proj)"),
        ("mixtral", "whole blocks", "attention only: MLP of other products: gate, experts"),
    ],
)
def test_the_reason_is_said(kind: str, name: str, words: str, tmp_path: Path, fewbit: Fewbit) -> None:
    out = quantized(tmp_path, kind)
    told, shown = fewbit("doctor", out, "--json").json["model"], fewbit("doctor", out).out
    assert told["name"] == name
    assert told["whole"] == 0
    assert told["half"] == (told["blocks"] if name == "whole blocks" else 0)
    assert sum(len(names) for names in told["reasons"].values()) == told["blocks"] == 2
    assert any(words in reason for reason in told["reasons"])
    assert words in " ".join(shown.split())


def test_a_recognized_model_needs_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = quantized(tmp_path, "llama", find("rtn-4bit").changed(scheme="int4-g32", format="gptq"))
    found = doctor.path_of(out)
    assert (found.name, found.blocks, found.whole, found.reasons, found.slower) == ("whole blocks", 2, 2, {}, {})
    monkeypatch.setenv("FEWBIT_ACTIVATIONS", "exact")
    exact = doctor.path_of(out)
    assert exact.whole == 0
    assert any("FEWBIT_ACTIVATIONS=exact" in reason for reason in exact.slower)


def test_a_model_that_is_not_packed() -> None:
    assert doctor.path_of("tiny").name == "unpacked"


def test_a_model_that_is_not_there(fewbit: Fewbit) -> None:
    assert fewbit("doctor", "no/such/folder/x").code != 0
