"""Folders that transformers loads through compressed-tensors and torchao are measured like any model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

import fewbit
from tests import models

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def by_torchao(model: Path, folder: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="make interop installs torchao")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    made: Any = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    made.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)


def by_compressed_tensors(model: Path, folder: Path) -> None:
    its = pytest.importorskip("compressed_tensors.quantization", reason="make interop installs compressed-tensors")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    args = its.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = its.QuantizationScheme(targets=["Linear"], weights=args)
    made = models.original(model)
    its.apply_quantization_config(
        made,
        its.QuantizationConfig(
            config_groups={"group_0": scheme},
            quant_method="compressed-tensors",
            format="pack-quantized",
            ignore=["lm_head"],
            quantization_status="frozen",
        ),
    )
    for module in made.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127
    compressor = compressors.ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    shutil.copytree(model, folder)
    tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    compressor.update_config(folder)


@pytest.mark.parametrize(("name", "make"), [("torchao", by_torchao), ("compressed-tensors", by_compressed_tensors)])
def test_it_is_measured_like_any_model(name: str, make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    model, folder, text = tmp_path / "model", tmp_path / "made", tmp_path / "text.txt"
    models.save(model, "mistral", hidden_size=128, intermediate_size=128)
    make(model, folder)
    text.write_text(models.sentences(80), encoding="utf-8")
    asked: dict[str, Any] = {"text": str(text), "length": 32, "samples": 2}
    seen = fewbit.inspect(folder)
    assert (seen.format, seen.schemes) == (name, {name: 14})
    assert seen.bits_per_weight_quantized == pytest.approx(8.3, abs=0.1)
    measured = fewbit.evaluate(folder, reference=model, **asked).quality
    assert measured.kl is not None
    assert 0 < measured.kl.mean.value < 0.02
    assert fewbit.generate(folder, "the", max_new_tokens=2).tokens == 2
    as_candidate = fewbit.compare(model, plans=[folder], **asked).rows[0]
    assert (as_candidate.plan, as_candidate.format, as_candidate.what) == ("made", name, f"as it is: {name}")
    assert as_candidate.loss is not None
    assert as_candidate.loss.kl.value == pytest.approx(measured.kl.mean.value, rel=0.01)
    assert as_candidate.weights is not None
    assert 0 <= as_candidate.weights.at_rest - seen.weights_bytes < 1000
    original, plain = fewbit.compare(folder, plans=["bf16", model], **asked).rows
    assert (original.what, plain.what) == (f"the original, {name}", "as it is: not quantized")
    assert plain.loss is not None
    assert 0 < plain.loss.kl.value < 0.02
