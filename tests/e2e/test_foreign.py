"""Folders of other makers: AutoGPTQ, AutoAWQ, gptqmodel and AutoRound; and sentences about those that are not read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import fewbit
from fewbit import hook
from fewbit.errors import FormatError
from fewbit.models.plugin import quantizer
from fewbit.nn.fused import packed_linears
from fewbit.plans.plan import Plan, Rule
from tests import architectures, models, packed_models


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    """fewbit reads AutoRound's files, also where auto-round is installed."""
    with packed_models.preferred("auto-round"):
        yield


def test_auto_round_may_keep_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, transformers uses it, until `prefer` is called."""
    monkeypatch.setattr(hook, "preferred", set())
    monkeypatch.setitem(quantizer._INSTALLED, "auto-round", lambda: True)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "auto-round", object)

    def served() -> bool:
        return auto.AUTO_QUANTIZER_MAPPING["auto-round"] is quantizer.FewbitQuantizer

    fewbit.prefer("gptq")
    assert not served()
    fewbit.prefer("auto-round")
    assert served()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in 4 and in 8 bits."""
    folder = tmp_path_factory.mktemp("made")
    model = models.save(folder / "model", "mistral")
    for bits in (4, 8):
        plan = Plan("p", "gptq", (Rule("*", f"int{bits}-g32-sym"),))
        fewbit.quantize(model, folder / str(bits), plan=plan)
    plan = Plan("p", "awq", (Rule("*", "int4-g32"),))
    fewbit.quantize(model, folder / "awq", plan=plan)
    return {"4": folder / "4", "8": folder / "8", "awq": folder / "awq"}


def copied(source: Path, folder: Path, config: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """The model in `source` with another quantization config (None: without one) and other tensors."""
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name not in ("fewbit.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    found = json.loads((source / "config.json").read_text(encoding="utf-8"))
    found["quantization_config"] = config
    if config is None:
        del found["quantization_config"]
    (folder / "config.json").write_text(json.dumps(found), encoding="utf-8")
    save_file(tensors or load_file(source / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    return folder


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = models.quantization_of(folder)
    return found


def logits(folder: Path) -> Tensor:
    return models.logits(fewbit.load(folder, dtype=torch.float32), torch.arange(12)[None])


def read_alike(folder: Path, wanted: Tensor) -> None:
    """Every way to read a folder gives the model with these logits."""
    assert fewbit.inspect(folder).quantized_parameters
    assert torch.equal(logits(folder), wanted)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(models.logits(plain, torch.arange(12)[None]), wanted)
    plain.save_pretrained(folder / "again")
    assert torch.equal(logits(folder / "again"), wanted)


@pytest.mark.parametrize("name", ["model", "gptq_model-4bit-32g"])
def test_old_autogptq(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copied(made["4"], tmp_path / "old", None)
    (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    settings = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "model_file_base_name": name}
    (folder / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    read_alike(folder, logits(made["4"]))


def test_old_autogptq_in_shards(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["4"], tmp_path / "old", None)
    file = "gptq_model-4bit-32g-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / file), file)}
    (folder / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "sym": True}), encoding="utf-8"
    )
    read_alike(folder, logits(made["4"]))


def test_old_autoawq(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made["awq"], tmp_path / "old", None)
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(settings), encoding="utf-8")
    read_alike(folder, logits(made["awq"]))


def test_bits_by_module(made: dict[str, Path], tmp_path: Path) -> None:
    four, eight = (load_file(made[bits] / "model.safetensors") for bits in ("4", "8"))
    mixed = {name: eight[name] if "down_proj" in name else four[name] for name in four}
    said = {"-:.*lm_head": {}, r"+:.*\.down_proj": {"bits": 8}, r".*\.up_proj": {"group_size": 32}}
    folder = copied(made["4"], tmp_path / "mixed", quantization(made["4"]) | {"dynamic": said}, mixed)
    assert set(fewbit.inspect(folder).schemes) == {"int4-g32-sym", "int8-g32-sym"}
    read_alike(folder, logits(folder))
    other = logits(made["4"])
    assert not torch.equal(logits(folder), other)
    # The same by AutoRound's words for it.
    extra = {name: {"bits": 8} for name in ("model.layers.0.mlp.down_proj", r".*\.1\.mlp\.down_proj")}
    config = auto_round("auto_round:auto_gptq") | {"extra_config": extra}
    read_alike(copied(made["4"], tmp_path / "extra", config, mixed), logits(folder))


@pytest.mark.parametrize(
    ("form", "scheme"), [("gptq", "int4-row"), ("gptq", "int4-g32-sym"), ("awq", "int4-g32"), ("fp8", "fp8-tensor")]
)
def test_defaults_of_transformers_change_nothing(form: str, scheme: str, tmp_path: Path) -> None:
    """transformers gives each key that a config lacks a default, and saves that."""
    model = models.save(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256)
    fewbit.quantize(model, tmp_path / "out", plan=Plan("p", form, (Rule("*", scheme),)), device="cpu")
    config, without = quantization(tmp_path / "out"), 0
    for key in config.keys() - {"quant_method"}:
        folder = copied(tmp_path / "out", tmp_path / key, {name: config[name] for name in config.keys() - {key}})
        try:
            wanted = logits(folder)
        except FormatError:
            continue
        fewbit.load(folder, device="cpu").save_pretrained(folder / "again")
        assert torch.equal(logits(folder / "again"), wanted), key
        without += 1
    assert without > 2


def auto_round(packing: str) -> dict[str, Any]:
    return {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": True}


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_auto_round_by_autogptq(made: dict[str, Path], tmp_path: Path, method: str) -> None:
    config = auto_round("auto_round:auto_gptq") | {"quant_method": method}
    read_alike(copied(made["4"], tmp_path / "r", config), logits(made["4"]))


def test_auto_round_by_autoawq(made: dict[str, Path], tmp_path: Path) -> None:
    config = auto_round("auto_round:auto_awq") | {"sym": False}
    read_alike(copied(made["awq"], tmp_path / "r", config), logits(made["awq"]))


@pytest.mark.parametrize(("kind", "layout"), [("mx_fp", "ct-mxfp4"), ("nv_fp", "ct-nvfp4")])
def test_auto_round_by_llm_compressor(kind: str, layout: str, tmp_path: Path) -> None:
    """4-bit floats have the tensors of compressed-tensors, under AutoRound's own config."""
    plain = models.save(tmp_path / "plain", "llama", intermediate_size=128)
    folder = packed_models.pack(plain, tmp_path / "packed", layout)
    group = {"mx_fp": 32, "nv_fp": 16}[kind]
    config = auto_round("auto_round:llm_compressor") | {"data_type": kind, "group_size": group, "act_bits": 4}
    models.edit_json(folder / "config.json", quantization_config=config)
    found = fewbit.inspect(folder)
    assert found.schemes == {{"mx_fp": "mxfp4", "nv_fp": "nvfp4"}[kind]: 14}
    values = models.tensors_of(plain)
    for model in (fewbit.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder)):
        assert len(packed_linears(model)) == 14
        model.save_pretrained(tmp_path / "again")
        packed_models.same_files(tmp_path / "again", folder)
    assert len(packed_linears(fewbit.load(tmp_path / "again", device="cpu"))) == 14
    own = fewbit.load(folder, device="cpu").dequantize().state_dict()
    assert all(torch.equal(own[name].float(), tensor.float()) for name, tensor in values.items())
    other = {**config, "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8}}}
    models.edit_json(folder / "config.json", quantization_config=other)
    with pytest.raises(FormatError, match=r"extra_config gives model\.layers\.0\.mlp\.down_proj settings"):
        fewbit.load(folder, device="cpu")


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:exllamav2"])
def test_auto_round_of_its_own(made: dict[str, Path], tmp_path: Path, packing: str) -> None:
    tensors = load_file(made["4"] / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):  # 8 in each nibble, where the older layout has 7
            tensors[name] = torch.full_like(tensor, -0x77777778)
    read_alike(copied(made["4"], tmp_path / "r", auto_round(packing), tensors), logits(made["4"]))


def test_scaled_activations(tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "gpt-neox")
    plan = Plan("p", "awq", (Rule("*", "int4-g32"),))
    fewbit.quantize(model, tmp_path / "awq", plan=plan)
    tensors = load_file(tmp_path / "awq" / "model.safetensors")
    layers = [name.removesuffix(".dense_h_to_4h.scales") for name in tensors if name.endswith("dense_h_to_4h.scales")]
    width = tensors[f"{layers[0]}.dense_h_to_4h.scales"].shape[1]
    scales = torch.linspace(0.5, 2, width)
    added = tensors | {f"{layer}.act.scales": scales.clone() for layer in layers}
    folder = copied(tmp_path / "awq", tmp_path / "scaled", quantization(tmp_path / "awq"), added)
    wanted = fewbit.load(tmp_path / "awq", dtype=torch.float32)
    for name, module in wanted.named_modules():
        if name.endswith("mlp.act"):
            module.register_forward_hook(lambda module, args, out: out / scales)
    read_alike(folder, models.logits(wanted, torch.arange(12)[None]))
    with pytest.raises(FormatError, match="AutoAWQ divides the outputs"):
        fewbit.load(folder).dequantize()
    misplaced = tensors | {"gpt_neox.nothing.scales": scales}
    with pytest.raises(FormatError, match=r"has no gpt_neox\.nothing"):
        fewbit.load(copied(folder, tmp_path / "m", quantization(folder), misplaced))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("mlx-4bit", "'mlx-4bit'"),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "MLX"),
        ({"anything": 1}, "no quant_method"),
        ([4], "must be an object"),
        (auto_round("auto_round:llm_compressor"), "AutoRound"),
        (auto_round("auto_round:auto_gptq") | {"data_type": "mx_fp"}, "AutoRound"),
        (auto_round("mlx"), "AutoRound"),
    ],
)
def test_a_maker_that_is_not_read(made: dict[str, Path], tmp_path: Path, config: Any, said: str) -> None:
    folder = copied(made["4"], tmp_path / "f", config)
    for verb in (fewbit.inspect, fewbit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FormatError, match=said):
            verb(folder)


@pytest.mark.parametrize(
    ("method", "tool"),
    [
        ("exl3", "EXL3"),
        ("exl2", "EXL2"),
        ("quip", "QuIP#"),
        ("mlx", "MLX"),
        ("marlin", "Marlin"),
        ("deepspeedfp", "DeepSpeed"),
    ],
)
def test_a_tool_that_nobody_here_reads(made: dict[str, Path], tmp_path: Path, method: str, tool: str) -> None:
    """transformers alone warns, skips the quantized weights, and makes new ones at random."""
    folder = copied(made["4"], tmp_path / "f", {"quant_method": method, "bits": 4.0})
    for verb in (fewbit.inspect, fewbit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FormatError, match=f"quantized by {tool}.*does not read"):
            verb(folder)
    with pytest.raises(FormatError, match=f"quantized by {tool}.*does not read"):
        fewbit.quantize(folder, tmp_path / "out", plan="nf4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "tool"),
    [
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "torchao"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, "HQQ"),
        ({"quant_method": "quanto", "weights": "int4"}, "Quanto"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "vptq", "config_for_layers": {}}, "VPTQ"),
        ({"quant_method": "bitnet"}, "BitNet"),
    ],
)
def test_a_tool_left_to_transformers(made: dict[str, Path], tmp_path: Path, config: Any, tool: str) -> None:
    """Its package is not installed, or its weights are missing: the error names the tool and what to use instead."""
    folder = copied(made["4"], tmp_path / "f", config)
    with pytest.raises(FormatError) as raised:
        fewbit.load(folder)
    assert f"quantized by {tool}" in raised.value.hint
    with pytest.raises(FormatError, match=f"quantized by {tool}.*does not read"):
        fewbit.quantize(folder, tmp_path / "out", plan="nf4")


def test_a_pattern_that_is_none(made: dict[str, Path], tmp_path: Path) -> None:
    config = quantization(made["4"]) | {"dynamic": {"+:(": {"bits": 8}}}
    with pytest.raises(FormatError, match="is not a regular expression"):
        fewbit.load(copied(made["4"], tmp_path / "f", config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers dequantizes where there is no GPU")
def test_another_back_end_of_transformers(tmp_path: Path, text: Path) -> None:
    """FP8 with scales, which transformers dequantizes on a CPU."""
    folder = models.save(tmp_path / "fp8", "mistral", hidden_size=128, intermediate_size=128)
    tensors = models.tensors_of(folder)
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    models.edit_json(folder / "config.json", quantization_config=config)
    seen = fewbit.inspect(folder)
    assert seen.format == "fp8"
    assert 0 < seen.quantized_parameters < seen.parameters
    assert seen.bits_per_weight_quantized == pytest.approx(8, abs=0.1)
    found = logits(folder)
    wide = {name: t.float() for name, t in tensors.items() if not name.endswith("_scale_inv")}
    wanted = logits(copied(folder, tmp_path / "wide", None, wide))
    assert (found - wanted).norm() < 1e-2 * wanted.norm()  # transformers computes with bfloat16 here
    measured = fewbit.evaluate(folder, text=str(text), length=32, samples=2)
    assert measured.inspection.format == "fp8"


def test_convolutions_of_a_hybrid_stay_as_they_are(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "m", "lfm2_moe")
    fewbit.quantize(folder, tmp_path / "q", plan="nf4", device="cpu")
    before, after = models.tensors_of(folder), models.tensors_of(tmp_path / "q")
    convolutions = [name for name in before if name.endswith(".conv.conv.weight")]
    assert convolutions
    for name in convolutions:
        assert torch.equal(after[name], before[name])
