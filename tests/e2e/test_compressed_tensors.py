"""compressed-tensors models as users have them: written, loaded packed, trained over, saved again, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import FormatError
from fewbit.models.plugin.compressed_tensors import CompressedTensorsConfig
from fewbit.nn.fused import packed_linears
from fewbit.plans.plan import Plan, Rule, find
from tests import architectures, models, packed_models

IDS = torch.arange(24)[None] + 3
CT = "compressed-tensors"
PLANS = {
    "w4a16": find("w4a16").changed(method="rtn"),
    "w8a16": find("w8a16"),
    "w8a8": Plan("w8a8", CT, (Rule("*", "int8-row-sym"),), activations="dynamic"),
    "mixed": Plan("mixed", CT, (Rule("*.mlp.*", "int3-g32"), Rule("*.o_proj", None), Rule("*", "int5-row-sym"))),
}


def written(tmp_path: Path, plan: str, kind: str = "llama", **changes: Any) -> Path:
    save = models.save if kind in models.FAMILIES else architectures.save
    model, out = save(tmp_path / "model", kind, **changes), tmp_path / plan
    fewbit.quantize(model, out, plan=PLANS[plan], progress=False, device="cpu")
    return out


@pytest.mark.parametrize("plan", ["fp8", "fp8-block", "mxfp4", "nvfp4"])
def test_floats_stay_packed_and_are_saved_again(plan: str, tmp_path: Path) -> None:
    out = tmp_path / plan
    model = models.save(tmp_path / "model", "llama", dtype="bfloat16")
    fewbit.quantize(model, out, plan=find(plan).changed(method="rtn"), progress=False, device="cpu")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert len(packed_linears(loaded)) == 14
    assert len(fewbit.generate(out, "the", max_new_tokens=2, device="cpu").text)
    loaded.save_pretrained(tmp_path / "again")
    found, stored = models.tensors_of(tmp_path / "again"), models.tensors_of(out)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)
    assert models.quantization_of(tmp_path / "again") == models.quantization_of(out)


@pytest.mark.parametrize(("kind", "method"), [("llama", "gptq"), ("llama", "imatrix"), ("qwen3_moe", "gptq")])
def test_nvfp4_has_the_scales_of_its_inputs(kind: str, method: str, tmp_path: Path) -> None:
    save = models.save if kind in models.FAMILIES else architectures.save
    model, out, text = save(tmp_path / "model", kind), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(models.sentences(40), encoding="utf-8")
    calibration = fewbit.Calibration(str(text), samples=4, length=32)
    chosen = find("nvfp4").changed(method=method)
    fewbit.quantize(model, out, plan=chosen, calibration=calibration, progress=False, device="cpu")
    stored, config = models.tensors_of(out), models.quantization_of(out)
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
    weights = {name.removesuffix("weight_packed") for name in stored if name.endswith("weight_packed")}
    scales = {name: stored[f"{name}input_global_scale"] for name in weights}
    assert all(scale.dtype == torch.float32 and scale.shape == (1,) for scale in scales.values())
    block = "model.layers.0.self_attn."
    assert scales[f"{block}q_proj."] == scales[f"{block}k_proj."] == scales[f"{block}v_proj."]
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert len(packed_linears(loaded)) == len(weights)
    loaded.save_pretrained(tmp_path / "again")
    again = models.tensors_of(tmp_path / "again")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[f"{name}input_global_scale"], scale) for name, scale in scales.items())


def test_global_scales_of_what_is_fused_are_equal(tmp_path: Path) -> None:
    model, out = models.save(tmp_path / "model", "llama"), tmp_path / "out"
    fewbit.quantize(model, out, plan=find("nvfp4").changed(method="rtn"), progress=False, device="cpu")
    stored = models.tensors_of(out)
    for fused in (("q", "k", "v"), ("gate", "up")):
        block = "self_attn" if "q" in fused else "mlp"
        scales = {stored[f"model.layers.0.{block}.{x}_proj.weight_global_scale"].item() for x in fused}
        assert len(scales) == 1


def test_scales_of_activations_are_saved_again(tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "ct-nvfp4")
    model: Any = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    found, stored = models.tensors_of(tmp_path / "again"), models.tensors_of(packed)
    assert found.keys() == stored.keys()
    assert any(name.endswith("input_global_scale") for name in stored)


def test_scales_of_fp8_keep_their_dtype(tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "ct-fp8")
    stored = models.tensors_of(packed)
    rounded = {n: t.bfloat16() for n, t in stored.items() if n.endswith("weight_scale")}
    packed_models.edit(packed, rounded)
    model: Any = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    found = models.tensors_of(tmp_path / "again")
    assert found.keys() == stored.keys()
    assert all(found[n].dtype == torch.bfloat16 and torch.equal(found[n], t) for n, t in rounded.items())


def test_fp8_of_another_kind_is_dequantized_and_said(tmp_path: Path) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", "ct-fp8-blocks")
    with pytest.warns(UserWarning, match="is dequantized in memory: .* blocks of"):
        loaded = fewbit.load(packed, device="cpu")
    wanted = models.tensors_of(plain)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items() if name in wanted)
    with pytest.raises(FormatError, match="does not keep such weights packed"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("plan", PLANS)
def test_from_pretrained_keeps_it_packed_and_saves_it_again(plan: str, dtype: str, tmp_path: Path) -> None:
    out = written(tmp_path, plan, dtype=dtype)
    stored = models.tensors_of(out)
    assert {str(t.dtype).removeprefix("torch.") for n, t in stored.items() if n.endswith("weight_scale")} == {dtype}
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert len(packed_linears(model)) == (12 if plan == "mixed" else 14)
    assert model.dtype == getattr(torch, dtype)
    again = tmp_path / "again"
    model.save_pretrained(again)
    found = models.tensors_of(again)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert models.quantization_of(again) == models.quantization_of(out)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(IDS).logits, model(IDS).logits)


def test_routers_and_the_head_are_ignored(tmp_path: Path) -> None:
    out = written(tmp_path, "w4a16", "qwen3_moe")
    config, stored = models.quantization_of(out), models.tensors_of(out)
    routers = [name.removesuffix(".weight") for name in stored if name.endswith("mlp.gate.weight")]
    assert routers
    assert {*routers, "lm_head"} <= set(config["ignore"])
    quantized = {name.removesuffix(".weight_packed") for name in stored if name.endswith("weight_packed")}
    assert any(".experts.1." in name for name in quantized)
    assert not quantized & set(config["ignore"])
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert set(packed_linears(model)) == quantized
    assert len(fewbit.generate(out, "the", max_new_tokens=3, device="cpu").text)


def test_a_forgotten_router_is_named_by_every_reader(tmp_path: Path) -> None:
    out = written(tmp_path, "w4a16", "qwen3_moe")
    config = models.quantization_of(out)
    config["ignore"] = [name for name in config["ignore"] if not name.endswith("layers.0.mlp.gate")]
    models.edit_json(out / "config.json", quantization_config=config)
    for attempt in (fewbit.inspect, fewbit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FormatError, match=r"layers\.0\.mlp\.gate\.weight is not quantized.*ignore"):
            attempt(out)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora_trains_over_it(tmp_path: Path) -> None:
    out = written(tmp_path, "mixed", dtype="float32")
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    plain = fewbit.load(out, device="cpu").dequantize()
    torch.manual_seed(0)
    gradients = []
    for base in (model, plain):
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        adapted(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name


def test_a_user_can_ask_for_dense_weights(tmp_path: Path) -> None:
    out = written(tmp_path, "w8a16")
    packed: Any = AutoModelForCausalLM.from_pretrained(out)
    wanted = fewbit.load(out, device="cpu").dequantize().state_dict()
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            out, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    for dense in (packed.dequantize(), loaded):
        assert not packed_linears(dense)
        assert not hasattr(dense.config, "quantization_config")
        assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in wanted.items())


def test_act_order_of_older_files_survives_saving(tmp_path: Path) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", "ct-int4-order")
    config = models.quantization_of(packed)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    models.edit_json(packed / "config.json", quantization_config=config)
    model: Any = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    found, stored = models.tensors_of(tmp_path / "again"), models.tensors_of(packed)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_rounded_scales_give_one_warning(tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "ct-int4")
    scales = {n: t.clone() for n, t in models.tensors_of(packed).items() if n.endswith("mlp.up_proj.weight_scale")}
    for i, scale in enumerate(scales.values()):
        scale[: i + 1, 0] = 3e-6
    packed_models.edit(packed, scales)
    with pytest.warns(UserWarning, match="3 scales were rounded") as caught:
        AutoModelForCausalLM.from_pretrained(packed)
    (warning,) = caught
    assert "in 2 tensors; model.layers.1.mlp.up_proj.weight_scale has most of them (2)" in str(warning.message)


def test_it_is_described_by_its_schemes(tmp_path: Path) -> None:
    seen = fewbit.inspect(written(tmp_path, "mixed", dtype="bfloat16"))
    assert (seen.format, seen.schemes) == (CT, {"int3-g32-bf16": 6, "int5-row-sym-bf16": 6})
    assert any("int3-g32-bf16 instead of int3-g32" in note for note in seen.made["notes"])
