"""compressed-tensors' own package reads what fewbit writes, and fewbit what it writes, with equal values."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.formats.base import Stored
from fewbit.formats.compressed_tensors import CompressedTensors
from fewbit.nn.fused import packed_linears
from fewbit.plans.plan import Plan, Rule, find
from fewbit.schemes.base import PartSpec, QTensor, parse
from tests import models
from tests.contract.cases import ordinary, quantized
from tests.interop.test_other_back_ends import _packed_by_preset

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

P = "model.layers.0.self_attn.q_proj"
SHAPE = (256, 384)
SPECS = [f"int{bits}-g128{kind}" for bits in range(2, 9) for kind in ("", "-sym", "-sym-bf16")]
SPECS += ["int4-row", "int8-row-sym", "fp8-row", "fp8-tensor", "fp8-b128", "mxfp4", "nvfp4"]
PRESETS = ("W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W5A16", "W6A16", "W7A16", "W8A16", "W8A8")
FLOATS = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")


def decompressed(tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The weight [N, K] by compressed-tensors' own code, in float32."""
    its = pytest.importorskip("compressed_tensors.quantization", reason="make interop installs compressed-tensors")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    group = its.QuantizationConfig.model_validate(config).config_groups["group_0"]
    own = compressors.BaseCompressor.get_value_from_registry(config["config_groups"]["group_0"]["format"])
    floats = {s: t.float() if t.is_floating_point() and t.itemsize > 1 else t for s, t in tensors.items()}
    made: Tensor = own.decompress(floats, group)["weight"]
    return made.float()


@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("spec", SPECS)
def test_it_reads_what_fewbit_writes(spec: str, activations: str | None) -> None:
    format = CompressedTensors(activations)
    scheme = parse(spec)
    if format.why_not(SHAPE, scheme) is not None:
        assert activations
        return
    weight = QTensor(scheme, SHAPE, quantized(scheme, ordinary(*SHAPE)))
    config = format.config([Stored(P, SHAPE, scheme)], ["lm_head"])
    tensors = format.lay_out(weight, config, P)
    found = decompressed(tensors, json.loads(json.dumps(config)))
    wanted = weight.dequantize()
    # It computes some formats in bfloat16.
    slack = 4e-3 if spec in ("mxfp4", "nvfp4") else 0
    assert (found - wanted).norm() <= slack * wanted.norm()


@pytest.mark.parametrize("preset", [*PRESETS, *FLOATS])
def test_fewbit_reads_what_it_writes(preset: str) -> None:
    tensors, _, config = _packed_by_preset(ordinary(*SHAPE, dtype=torch.bfloat16), preset)
    form, format = config["format"], CompressedTensors()
    found = format.find(config, {f"{P}.{suffix}": PartSpec.of(tensor) for suffix, tensor in tensors.items()})
    weight = format.read({suffix: tensors[suffix] for suffix in found[P]}, config, P)
    config["config_groups"]["group_0"]["format"] = form
    wanted = decompressed(tensors, config)
    slack = 4e-3 if "FP4" in preset else 0
    assert (weight.dequantize() - wanted).norm() <= slack * wanted.norm()
    again = format.lay_out(weight, config, P)
    for suffix, tensor in again.items():
        assert torch.equal(tensor.float(), tensors[suffix].float().reshape(tensor.shape)), suffix


def test_models_stay_packed_with_the_package_installed(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="make interop installs compressed-tensors")
    model = models.save(tmp_path / "model", "llama", dtype="bfloat16")
    fewbit.quantize(model, tmp_path / "out", plan="w8a16", progress=False, device="cpu")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(packed_linears(loaded)) == 14
    assert "re:" not in str(loaded.config.quantization_config.ignore)


SCRIPT = """
    import sys, torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    assert not any(name.startswith("fewbit") for name in sys.modules)
    folder, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        save_file({"logits": model(torch.arange(3, 27)[None]).logits.float()}, out)
"""


MIXTURES = {
    "mixed": (Rule("*.mlp.*", "int4-g128-sym"), Rule("*", "int8-row-sym")),
    "head": (Rule("lm_head", "int8-row-sym"), Rule("*", "int4-g128-sym")),  # which is tied in the original
    "head as blocks": (Rule("lm_head", "int4-g128-sym"), Rule("*", "int4-g128-sym")),
    "head in fp8": (Rule("lm_head", "fp8-row"), Rule("*", "int4-g128-sym")),
}


@pytest.mark.parametrize("plan", ["w4a16", "w8a16", "fp8", "fp8-block", *MIXTURES])
def test_transformers_alone_reads_whole_models(plan: str, tmp_path: Path) -> None:
    """Symmetric integers and FP8: transformers 5.24 expects zero points of another shape in every asymmetric file."""
    pytest.importorskip("compressed_tensors", reason="make interop installs compressed-tensors")
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    model = models.save(tmp_path / "model", "llama", dtype="bfloat16", **sizes)
    mixed = Plan(plan, "compressed-tensors", MIXTURES.get(plan, ()))
    chosen = mixed if plan in MIXTURES else find(plan).changed(method="rtn")
    chosen = replace(chosen, activations=None)  # it would round activations
    fewbit.quantize(model, tmp_path / "out", plan=chosen, progress=False, device="cpu")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    subprocess.run([sys.executable, script, tmp_path / "out", tmp_path / "theirs.safetensors"], check=True, timeout=300)
    theirs = load_file(tmp_path / "theirs.safetensors")["logits"]
    ours: Any = fewbit.load(tmp_path / "out", device="cpu").dequantize()
    with torch.no_grad():
        wanted = ours(torch.arange(3, 27)[None]).logits.float()
    assert (theirs - wanted).norm() <= 2e-2 * wanted.norm()  # it computes weights in bfloat16
