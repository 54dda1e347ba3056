"""FP8 models in DeepSeek's layout as users have them: written, loaded packed, saved again, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import FormatError
from fewbit.models import decoded
from fewbit.models.source import locate
from fewbit.nn.fused import packed_linears
from fewbit.pipeline.job import Job
from fewbit.plans.plan import Plan, Rule, find
from fewbit.system import native
from tests import architectures, models, packed_models

IDS = torch.arange(24)[None] + 3
BLOCKS = Plan("blocks", "fp8", (Rule("*", "fp8-b128"),))
TENSORS = Plan("tensors", "fp8", (Rule("*", "fp8-tensor"),))


@pytest.mark.parametrize("plan", [BLOCKS, TENSORS], ids=["blocks", "tensors"])
def test_what_is_written_loads_packed_and_is_saved_again(plan: Plan, tmp_path: Path) -> None:
    """The widths 288 and 384 give blocks of which the last are smaller, and blocks that are all whole."""
    model = models.save(tmp_path / "model", "llama", dtype="bfloat16", hidden_size=288, intermediate_size=384)
    out = tmp_path / "out"
    fewbit.quantize(model, out, plan=plan, progress=False, device="cpu")
    stored = models.tensors_of(out)
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored[f"{name}_scale_inv"].shape == ((3, 3) if plan is BLOCKS else (1,))
    assert models.quantization_of(out)["weight_block_size"] == ([128, 128] if plan is BLOCKS else None)
    assert "lm_head" in models.quantization_of(out)["modules_to_not_convert"]
    assert fewbit.inspect(out).schemes == {"fp8-b128" if plan is BLOCKS else "fp8-tensor": 14}
    with packed_models.preferred("fp8"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(out)
        assert len(packed_linears(loaded)) == 14
        loaded.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", out)
    again = models.quantization_of(tmp_path / "again")  # transformers adds its defaults
    assert {**again, **models.quantization_of(out)} == again


def test_the_library_and_pytorch_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in blocks of experts, which are stacked when they are loaded."""
    for kind in ("llama", "qwen3_moe"):
        folder = architectures.save(tmp_path / kind, kind)
        fewbit.quantize(folder, tmp_path / f"{kind}-native", plan="fp8", progress=False, device="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(native, "_takes", lambda w: False)
            fewbit.quantize(folder, tmp_path / f"{kind}-torch", plan="fp8", progress=False, device="cpu")
        packed_models.same_files(tmp_path / f"{kind}-native", tmp_path / f"{kind}-torch")


def test_rounding_reads_weights_as_they_are_stored(tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", dtype="bfloat16")
    skeleton = Job.prepare(locate(model), find("fp8"), "cpu").settled.skeleton
    first = skeleton.blocks[0]
    for as_stored, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with skeleton.materialized(first, as_stored=as_stored):
            weights = {name: skeleton.weight(name) for name in skeleton.linears(first)}
            assert len(weights) == 7
            for name, weight in weights.items():
                assert weight.dtype == dtype
                assert torch.equal(weight, skeleton.checkpoint.get(f"{name}.weight").to(dtype))
        assert all(skeleton.weight(name).is_meta for name in weights)


def test_a_preset_is_written_in_this_format(tmp_path: Path) -> None:
    """The preset declares that servers round activations. So do all files of this format."""
    model = models.save(tmp_path / "model", "llama")
    fewbit.quantize(model, tmp_path / "out", plan=find("fp8-block").changed(format="fp8"), progress=False)
    assert fewbit.inspect(tmp_path / "out").schemes == {"fp8-b128": 14}


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    """transformers, which serves FP8 unless fewbit is preferred, and takes each block as one of equal size."""
    model = models.save(tmp_path / "model", "llama", dtype="bfloat16", hidden_size=256, intermediate_size=384)
    out = tmp_path / "out"
    fewbit.quantize(model, out, plan=BLOCKS, progress=False, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not packed_linears(theirs)
    ours = fewbit.load(out, dtype=torch.float32, device="cpu")
    assert len(packed_linears(ours)) == 14
    wanted = models.logits(theirs, IDS)
    assert (models.logits(ours, IDS) - wanted).norm() < 1e-3 * wanted.norm()


def test_a_gpu_keeps_them_packed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plain = models.save(tmp_path / "model", "llama", hidden_size=256)
    for scheme, left in (("fp8-b128", False), ("fp8-block", True)):
        source = locate(packed_models.pack(plain, tmp_path / scheme, scheme))
        assert decoded.is_left(source, "cuda") == left
        assert decoded.is_packed(source) != left


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
def test_experts_stay_packed(kind: str, tmp_path: Path) -> None:
    plain = architectures.save(tmp_path / "plain", kind)
    packed = packed_models.pack(plain, tmp_path / "packed", "fp8-b128")
    model, stored = fewbit.load(packed, device="cpu"), models.tensors_of(packed)
    assert len(packed_linears(model)) == sum(name.endswith("_scale_inv") for name in stored)
    model.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)
    values, own = models.tensors_of(plain), model.dequantize().state_dict()
    assert sum(".experts." in name for name in values) > 10
    assert all(torch.equal(own[name].float(), tensor.float()) for name, tensor in values.items())


def test_scales_of_activations_are_saved_again(tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "fp8-tensor")
    fewbit.load(packed, device="cpu").save_pretrained(tmp_path / "again")
    found = models.tensors_of(tmp_path / "again")
    assert found.keys() == models.tensors_of(packed).keys()
    assert any(name.endswith("activation_scale") for name in found)
    assert "weight_block_size" not in models.quantization_of(packed)
    assert fewbit.inspect(tmp_path / "again").schemes == {"fp8-tensor": 14}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_keep_the_dtype_of_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "fp8-b128")
    scales = {name: t for name, t in models.tensors_of(packed).items() if name.endswith("_scale_inv")}
    packed_models.edit(packed, {name: t.log2().ceil().exp2().to(dtype) for name, t in scales.items()})
    model = fewbit.load(packed, device="cpu")
    assert len(packed_linears(model)) == len(scales)
    model.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)


BAD = {
    "0": (torch.zeros(1, 1), "weight_scale_inv has numbers that are not above 0"),
    "negative": (-torch.ones(1, 1), "weight_scale_inv has numbers that are not above 0"),
    "NaN": (torch.full((1, 1), torch.nan), "weight_scale_inv has"),
    "shape": (torch.ones(1, 2), r"weight_scale_inv is float32 \[1, 2\]; \[1, 1\] .* expected"),
    "missing": (None, "weight_scale_inv is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_scales_are_named(case: str, tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "fp8-b128")
    scale, words = BAD[case]
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    assert models.tensors_of(packed)[name].shape == (1, 1)
    packed_models.edit(packed, {name: scale})
    with pytest.raises(FormatError, match=f"model.layers.0.self_attn.q_proj.{words}"):
        fewbit.load(packed, device="cpu")
