"""Exact conversions of 4-bit floats: MXFP4 in three formats, and NVFP4 in the files of two makers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fewbit
from fewbit.errors import PlanError
from fewbit.formats.base import Stored
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.mxfp4 import Mxfp4Format
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from fewbit.plans.plan import Plan, Rule
from fewbit.schemes.base import parse
from tests import architectures, models, packed_models

CT = "compressed-tensors"
EXPERTS = "model.layers.0.mlp.experts"
IDS = torch.arange(24)[None] + 3


def converted(model: Path, out: Path, to: str) -> Any:
    return fewbit.convert(model, out, to=to, progress=False)


def values(model: Path) -> dict[str, Tensor]:
    """The values of the quantized weights, in float64, by the names of their modules in the model."""
    source = locate(model)
    AutoConfig.from_pretrained(source.folder, **source.options)
    skeleton = Skeleton(source, source.dtype, torch.device("cpu"))
    assert skeleton.packing is not None
    read = {skeleton.name_of[name]: weight.read() for name, weight in skeleton.packing.weights.items()}
    return {name: weight.dequantize(torch.float64) for name, weight in read.items()}


def same_values(one: Path, other: Path) -> None:
    a, b = values(one), values(other)
    assert a.keys() == b.keys()
    assert a
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    return packed_models.pack_gpt_oss(architectures.save(tmp_path / "plain", "gpt_oss"), tmp_path / "first")


def test_gpt_oss_goes_to_compressed_tensors_and_back(gpt_oss: Path, tmp_path: Path) -> None:
    done = converted(gpt_oss, tmp_path / "second", CT)
    layers, experts = 2, 4
    assert (done.exact, done.schemes, done.decoded) == (True, {"mxfp4": 3 * layers * experts}, [])
    same_values(gpt_oss, tmp_path / "second")
    before, there = models.tensors_of(gpt_oss), models.tensors_of(tmp_path / "second")
    rows = before[f"{EXPERTS}.gate_up_proj_blocks"][1, 1::2]  # up has the odd rows
    assert torch.equal(there[f"{EXPERTS}.1.up_proj.weight_packed"], rows.flatten(1))
    bias = before[f"{EXPERTS}.gate_up_proj_bias"][3, 0::2]
    assert torch.equal(there[f"{EXPERTS}.3.gate_proj.bias"], bias)
    assert not [name for name in there if name.endswith(("_blocks", "_scales", "proj_bias"))]

    back = converted(tmp_path / "second", tmp_path / "third", "mxfp4")
    assert (back.exact, back.schemes, back.output_bytes) == (True, done.schemes, done.original_bytes)
    packed_models.same_files(tmp_path / "third", gpt_oss)
    logits = [
        models.logits(fewbit.load(folder, dtype=torch.float32, device="cpu", kernel="reference"), IDS)
        for folder in (gpt_oss, tmp_path / "second", tmp_path / "third")
    ]
    assert torch.allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[0], logits[2])


def test_plain_transformers_loads_a_converted_gpt_oss(gpt_oss: Path, tmp_path: Path) -> None:
    converted(gpt_oss, tmp_path / "second", CT)
    converted(tmp_path / "second", tmp_path / "third", "mxfp4")
    config = models.quantization_of(tmp_path / "third")
    assert config["quant_method"] == "mxfp4"
    assert {"lm_head", "model.layers.*.mlp.router", "model.layers.*.self_attn.q_proj"} <= set(
        config["modules_to_not_convert"]
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "third").state_dict()
    wanted = models.tensors_of(gpt_oss.with_name("plain"))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in wanted.items())


def test_layers_with_ordinary_experts_stay_so(gpt_oss: Path, tmp_path: Path) -> None:
    kept, changes = models.tensors_of(gpt_oss.with_name("plain")), dict[str, Tensor | None]()
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"{EXPERTS}.{leaf}"
        changes |= {f"{name}_blocks": None, f"{name}_scales": None, name: kept[name]}
    packed_models.edit(gpt_oss, changes)
    converted(gpt_oss, tmp_path / "second", CT)
    converted(tmp_path / "second", tmp_path / "third", "mxfp4")
    packed_models.same_files(tmp_path / "third", gpt_oss)


@pytest.mark.parametrize(
    ("kind", "rule", "words"),
    [
        ("gpt_oss", "*", r"hold the experts of gpt-oss only, and \S+ is not one"),
        ("qwen3_moe", "*experts*", r"gate and up alternate, as in gpt-oss, and \S+ belongs to Qwen3MoeExperts"),
    ],
)
def test_what_mxfp4_files_cannot_hold_is_refused(kind: str, rule: str, words: str, tmp_path: Path) -> None:
    model = architectures.save(tmp_path / "model", kind)
    fewbit.quantize(model, tmp_path / "first", plan=Plan("p", CT, (Rule(rule, "mxfp4"),)), progress=False)
    with pytest.raises(PlanError, match=words):
        converted(tmp_path / "first", tmp_path / "second", "mxfp4")
    assert not (tmp_path / "second").exists()


def test_mxfp4_files_hold_all_experts_of_a_layer() -> None:
    format, scheme = Mxfp4Format(), parse("mxfp4")
    weights = [Stored(f"{EXPERTS}.{expert}.down_proj", (64, 96), scheme) for expert in range(4)]
    assert format.why_not_together(weights, ["lm_head", "model.layers.1.mlp.experts.0.down_proj"]) is None
    reason = format.why_not_together(weights[:3], [weights[3].module])
    assert reason == f"mxfp4 files hold all experts of a layer or none, and {weights[3].module} is not quantized"


def test_mxfp4_goes_to_gguf_and_back(tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", intermediate_size=128, attention_bias=False)
    plan = Plan("p", CT, (Rule("*", "mxfp4", "rtn"),))
    fewbit.quantize(model, tmp_path / "first", plan=plan, progress=False)
    done = converted(tmp_path / "first", tmp_path / "second.gguf", "gguf")
    assert (done.exact, done.schemes) == (True, {"mxfp4": 14})
    file = GgufFile(tmp_path / "second.gguf")
    assert file.entries["blk.0.ffn_down.weight"].type == "mxfp4"
    same_values(tmp_path / "first", tmp_path / "second.gguf")
    back = converted(tmp_path / "second.gguf", tmp_path / "third", CT)
    assert (back.exact, back.schemes) == (True, {"mxfp4": 14})
    a, b = models.tensors_of(tmp_path / "first"), models.tensors_of(tmp_path / "third")
    assert a.keys() == b.keys()
    packed = [name for name in a if name.endswith(("weight_packed", "weight_scale"))]
    assert len(packed) == 28
    assert all(torch.equal(a[name], b[name]) for name in packed)
    logits = [
        models.logits(fewbit.load(tmp_path / name, dtype=torch.float32, kernel="reference"), IDS)
        for name in ("first", "second.gguf")
    ]
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_the_package_gguf_reads_converted_mxfp4(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = models.save(tmp_path / "model", "qwen3", intermediate_size=128)
    fewbit.quantize(model, tmp_path / "first", plan=Plan("p", CT, (Rule("*", "mxfp4", "rtn"),)), progress=False)
    converted(tmp_path / "first", tmp_path / "second.gguf", "gguf")
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "second.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    assert tensor.tensor_type.name == "MXFP4"
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    wanted = values(tmp_path / "first")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(torch.from_numpy(read).double(), wanted)


def test_a_plan_writes_mxfp4_blocks(tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", intermediate_size=128)
    plan = Plan("p", "gguf", (Rule("*", "mxfp4", "rtn"),))
    fewbit.quantize(model, tmp_path / "out.gguf", plan=plan, progress=False)
    file = GgufFile(tmp_path / "out.gguf")
    assert file.metadata["general.file_type"] == 38  # llama.cpp's MXFP4_MOE
    assert {entry.type for entry in file.entries.values() if len(entry.shape) > 1} == {"mxfp4"}


def modelopt(tmp_path: Path, *, exact: bool) -> Path:
    """A model in ModelOpt's NVFP4. exact: its global scales are powers of two."""
    plain = models.save(tmp_path / "plain", "llama", dtype="float32")
    packed = packed_models.pack(plain, tmp_path / "packed", "modelopt-nvfp4")
    changes: dict[str, Tensor | None] = {
        name: tensor.log2().round().exp2() if exact else torch.tensor(0.0123)
        for name, tensor in models.tensors_of(packed).items()
        if name.endswith("weight_scale_2")
    }
    return packed_models.edit(packed, changes)


def test_nvfp4_of_modelopt_becomes_that_of_compressed_tensors(tmp_path: Path) -> None:
    first = modelopt(tmp_path, exact=True)
    done = converted(first, tmp_path / "second", CT)
    assert (done.exact, done.schemes) == (True, {"nvfp4": 14})
    same_values(first, tmp_path / "second")
    a, b = models.tensors_of(first), models.tensors_of(tmp_path / "second")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(a[f"{name}.weight"], b[f"{name}.weight_packed"])
    assert torch.equal(a[f"{name}.weight_scale"].view(torch.uint8), b[f"{name}.weight_scale"].view(torch.uint8))
    assert b[f"{name}.weight_global_scale"].tolist() == [1 / a[f"{name}.weight_scale_2"].item()]


def test_a_global_scale_without_reciprocal_is_refused(tmp_path: Path) -> None:
    first = modelopt(tmp_path, exact=False)
    words = r"14 of 14 .*\n.*nvfp4-mul; .*global scale 0\.0122\d* multiplies .* if it divides; a power of two"
    with pytest.raises(PlanError, match=words):
        converted(first, tmp_path / "second", CT)
    assert not (tmp_path / "second").exists()
