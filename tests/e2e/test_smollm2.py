"""A real model, small: GPTQ loses less than rounding, the output speaks, and the files say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit.api import generate, quantize
from fewbit.models.decoding import sampling
from fewbit.plans.plan import find
from fewbit.texts import calibration
from tests.e2e.conftest import Fewbit

LINEARS = 210  # 30 blocks of seven


@pytest.fixture(scope="module")
def quantized(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "gptq"
    # The sweeps that refine the codes double the time; what is asked here does not depend on them.
    plan = find("gptq-4bit").changed(options={"refine": "0"})
    quantize.quantize(demo, out, plan=plan, calibration=calibration.Calibration(samples=8, length=256))
    return out


@pytest.fixture(scope="module")
def rounded(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "rtn"
    quantize.quantize(demo, out, plan="rtn-4bit")
    return out


def test_gptq_stays_nearer_to_the_original_than_rounding(
    demo: Path, quantized: Path, rounded: Path, fewbit: Fewbit
) -> None:
    few = ("--reference", demo, "--length", 256, "--samples", 3, "--json")
    gptq, rtn = (fewbit("evaluate", model, *few) for model in (quantized, rounded))
    assert (gptq.code, rtn.code) == (0, 0)
    lost, worse = gptq.json, rtn.json
    assert lost["tokens"] == worse["tokens"] == 3 * 255
    assert lost["reference_perplexity"] == pytest.approx(worse["reference_perplexity"], rel=1e-6)
    assert 2 < lost["reference_perplexity"] < 60
    assert lost["reference_perplexity"] < lost["perplexity"] < worse["perplexity"] < 3 * lost["reference_perplexity"]
    assert lost["perplexity_ratio"] == pytest.approx(lost["perplexity"] / lost["reference_perplexity"])
    assert 0 < lost["kl"]["mean"] < 0.8 * worse["kl"]["mean"]
    assert lost["kl"].keys() == {"mean", "median", "p99", "p999", "max"}
    assert lost["kl"]["median"] <= lost["kl"]["mean"] <= lost["kl"]["p99"] <= lost["kl"]["p999"] <= lost["kl"]["max"]
    assert worse["same_top"] < lost["same_top"] < 1
    assert lost["intervals"]["kl"]["mean"][0] <= lost["kl"]["mean"] <= lost["intervals"]["kl"]["mean"][1]
    # 105M weights at 4 + 16/64 bits, and a bf16 embedding of 28M beside them.
    assert lost["bits_per_weight_quantized"] == 4.25
    assert lost["weights_bytes"] == worse["weights_bytes"]
    assert lost["bits_per_weight"] == pytest.approx(8 * lost["weights_bytes"] / 134_515_008, rel=1e-9)
    assert 5 < lost["bits_per_weight"] < 7


def test_it_loads_packed_and_speaks(quantized: Path, fewbit: Fewbit) -> None:
    answer = fewbit("generate", quantized, "The capital of France is", "--max-new-tokens", 12, "--json")
    assert answer.code == 0
    assert "Paris" in answer.json["text"]
    chat = fewbit("generate", quantized, "What is two plus two?", "--chat", "--max-new-tokens", 12)
    assert chat.code == 0
    assert "tokens/s" in chat.err
    assert chat.out.strip()
    assert "<|im_start|>" not in chat.out


def test_sampling_answers_to_its_seed(quantized: Path) -> None:
    def said(seed: int) -> str:
        return generate.generate(
            quantized, "Once upon a time", max_new_tokens=10, sampling=sampling.Sampling(1.5, seed=seed)
        ).text

    assert said(1) == said(1) != said(2)


def test_inspect_tells_what_it_is(quantized: Path, fewbit: Fewbit) -> None:
    found = fewbit("inspect", quantized, "--json").json
    assert found["schemes"] == {"int4-g64-sym": LINEARS}
    assert found["format"] == "gptq"
    assert found["parameters"] == 134_515_008
    assert found["bits_per_weight_quantized"] == 4.25
    assert any("groups of 64 instead of 128" in note for note in found["made"]["notes"])
    shown = fewbit("inspect", quantized)
    assert shown.code == 0
    for words in ("int4-g64-sym", str(LINEARS), "groups of 64", "LlamaForCausalLM", "8 x 256 tokens of pydoc"):
        assert words in shown.out


def test_in_bfloat16_it_is_near_what_it_is_in_float32(quantized: Path) -> None:
    ids = torch.arange(1000, 1032).unsqueeze(0)
    with torch.inference_mode():
        exact, rounded = (
            generate.load(quantized, dtype=d)(ids).logits.float() for d in (torch.float32, torch.bfloat16)
        )
    assert float((exact - rounded).norm() / exact.norm()) < 2e-2
