"""Mixtures of experts at their edges: one expert, widths that no group size divides, experts over several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fewbit
from fewbit.errors import PlanError
from fewbit.models.plugin import quantizer
from fewbit.nn.layers import QLinear
from tests import architectures, models
from tests.e2e.test_ranks import torchrun

ONE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 1, "num_experts_per_tok": 1},
    "gpt_oss": {"num_local_experts": 1, "num_experts_per_tok": 1},
}


def save(folder: Path, kind: str, changes: dict[str, Any]) -> Path:
    config = architectures.config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    architectures.draw(model, 1)
    model.eval().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def check(model: Any, folder: Path) -> None:
    """The model computes what transformers' own computes with its dequantized weights."""
    ids = torch.randint(3, models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    wanted = models.logits(architectures.with_values(models.original(folder), model), ids)
    assert (models.logits(model, ids) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.filterwarnings("ignore:BitsAndBytesConfig.*stay in")  # routers, a large part of a tiny model
@pytest.mark.parametrize("plan", ["gptq-4bit", "on load"])
@pytest.mark.parametrize("kind", ONE)
def test_a_layer_of_one_expert(kind: str, plan: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", kind, ONE[kind])
    if plan == "on load":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        with quantizer.serving("reference"):
            made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        made.save_pretrained(tmp_path / "out")
    else:
        calibration = fewbit.Calibration([models.sentences(60)], samples=4, length=32)
        fewbit.quantize(folder, tmp_path / "out", plan=plan, calibration=calibration, device="cpu")
    model = fewbit.load(tmp_path / "out", dtype=torch.float32, kernel="reference")
    packed = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
    assert {f"model.layers.{layer}.mlp.experts.0.down_proj" for layer in range(2)} <= packed
    check(model, folder)


def test_experts_that_no_group_divides_are_named_in_short(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen3_moe", {"moe_intermediate_size": 40})
    with pytest.raises(PlanError) as refused:
        fewbit.preview(folder, plan="gptq-4bit")
    assert "experts.0-3.down_proj stays as it is: groups of 32 do not divide 40 columns" in str(refused.value)
    assert "experts.3" not in str(refused.value)  # thousands of names in a large model
    fewbit.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")  # its blocks go on over the ends of rows
    check(fewbit.load(tmp_path / "out", dtype=torch.float32, kernel="reference"), folder)


@pytest.mark.slow
def test_two_processes_quantize_experts_as_one_does(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", "qwen3_moe")
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(200), encoding="utf-8")
    settings = [
        "--plan",
        "gptq-4bit",
        "--calibration",
        str(text),
        "--samples",
        "7",
        "--length",
        "32",
        "--device",
        "cpu",
    ]
    ended = torchrun(
        2, "-m", "fewbit", "quantize", str(folder), "-o", str(tmp_path / "two"), *settings, cache=tmp_path / "cache"
    )
    assert ended.returncode == 0, ended.stderr
    calibration = fewbit.Calibration(str(text), samples=7, length=32)
    fewbit.quantize(folder, tmp_path / "one", plan="gptq-4bit", calibration=calibration, device="cpu")
    one, two = (json.loads((tmp_path / name / "fewbit.json").read_text("utf-8"))["tensors"] for name in ("one", "two"))
    assert [tensor["module"] for tensor in two] == [tensor["module"] for tensor in one]
    assert [tensor["error"] for tensor in two] == pytest.approx([tensor["error"] for tensor in one], rel=0.03)
    check(fewbit.load(tmp_path / "two", dtype=torch.float32, kernel="reference"), folder)
