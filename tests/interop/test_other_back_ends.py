"""Folders of compressed-tensors and torchao are measured like any model, and those of compressed-tensors quantized."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TorchAoConfig

import fewbit
from fewbit.models import decoded
from fewbit.models.source import locate
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
    schemes = {"int8-row-sym" if name == "compressed-tensors" else name: 14}
    assert (seen.format, seen.schemes) == (name, schemes)
    assert seen.bits_per_weight_quantized == pytest.approx(8.2, abs=0.2)
    measured = fewbit.evaluate(folder, reference=model, **asked).quality
    assert measured.kl is not None
    assert 0 < measured.kl.mean.value < 0.02
    assert fewbit.generate(folder, "the", max_new_tokens=2).tokens == 2
    as_candidate = fewbit.compare(model, plans=[folder], **asked).rows[0]
    assert (as_candidate.plan, as_candidate.format, as_candidate.what) == (
        "made",
        name,
        f"as it is: {next(iter(schemes))}",
    )
    assert as_candidate.loss is not None
    assert as_candidate.loss.kl.value == pytest.approx(measured.kl.mean.value, rel=0.01)
    assert as_candidate.weights is not None
    assert 0 <= as_candidate.weights.at_rest - seen.weights_bytes < 1000
    original, plain = fewbit.compare(folder, plans=["bf16", model], **asked).rows
    assert (original.what, plain.what) == (f"the original, {name}", "as it is: not quantized")
    assert plain.loss is not None
    assert 0 < plain.loss.kl.value < 0.02


def _packed_by_preset(w: Tensor, preset: str) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The tensors in which compressed-tensors stores a weight by one of its presets, its values, and the config."""
    its = pytest.importorskip("compressed_tensors.quantization", reason="make interop installs compressed-tensors")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    scheme = its.preset_name_to_scheme(preset, ["Linear"])
    args, (n, k) = scheme.weights, w.shape
    block = {"tensor": (n, k), "channel": (1, k), "block": tuple(args.block_structure or ())}
    rows, columns = block.get(str(getattr(args.strategy, "value", args.strategy)), (1, args.group_size))
    parts = w.reshape(n // rows, rows, k // columns, columns)
    low, high = parts.amin((1, 3)), parts.amax((1, 3))
    state = {"weight": w}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = helpers.generate_gparam(w.min(), w.max()).reshape(1)
    scale, zero = helpers.calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state |= {"weight_scale": scale.reshape(1) if (rows, columns) == (n, k) else scale, "weight_zero_point": zero}
    form = compressors.format.infer_module_format(torch.nn.Linear, scheme)
    own = compressors.BaseCompressor.get_value_from_registry(form.value)
    packed = own.compress(state, scheme)
    groups = its.QuantizationConfig(config_groups={"group_0": scheme}, format=form.value, ignore=["lm_head"])
    return packed, own.decompress(dict(packed), scheme)["weight"], groups.to_dict()


PRESETS = ("W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W5A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")


@pytest.mark.parametrize("preset", [*PRESETS, "NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_compressed_tensors_weights_are_decoded(preset: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    folder = models.save(tmp_path / "m", "mistral", dtype="bfloat16", **sizes)
    stored, wanted, config = dict[str, Tensor](), dict[str, Tensor](), dict[str, Any]()
    for name, tensor in models.tensors_of(folder).items():
        if name.endswith("proj.weight"):
            parts, wanted[name], config = _packed_by_preset(tensor, preset)
            stored |= {f"{name.removesuffix('weight')}{part}": each.contiguous() for part, each in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    models.edit_json(folder / "config.json", quantization_config=config)
    checkpoint, packing = decoded.opened(locate(folder))
    assert packing is not None
    for name, values in wanted.items():
        found = checkpoint.get(name)
        assert found.dtype == torch.bfloat16
        # Some of its formats are computed in bfloat16, which rounds twice.
        assert (found.float() - values.float()).norm() <= 4e-3 * values.float().norm(), name
    fewbit.quantize(folder, tmp_path / "out", plan="nf4")
