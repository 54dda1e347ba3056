"""Scales of the KV cache in a quantized model: kept when it is saved again, or named when an output leaves them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.plans.plan import Plan, Rule
from tests import models, packed_models

ATTENTION = "model.layers.1.self_attn"
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
# Format -> the names of such scales.
NAMES = {
    "compressed-tensors": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
    "modelopt": (f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"),
}


def with_scales(tmp_path: Path, format: str) -> Path:
    model, made = models.save(tmp_path / "model", "llama"), tmp_path / "first"
    if format == "modelopt":
        packed_models.pack(model, made, "modelopt-fp8")
    else:
        plan = Plan("p", format, (Rule("*", "fp8-row", "rtn"),))
        fewbit.quantize(model, made, plan=plan, progress=False)
        config = models.quantization_of(made)
        models.edit_json(made / "config.json", quantization_config={**config, "kv_cache_scheme": SCHEME})
    return packed_models.edit(made, {name: torch.tensor([0.25]) for name in NAMES[format]})


@pytest.mark.parametrize("format", NAMES)
def test_saving_keeps_them(format: str, tmp_path: Path) -> None:
    first = with_scales(tmp_path, format)
    fewbit.load(first, device="cpu").save_pretrained(tmp_path / "second")
    packed_models.same_files(tmp_path / "second", first)
    AutoModelForCausalLM.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    packed_models.same_files(tmp_path / "third", first)
    if format == "compressed-tensors":
        config = models.quantization_of(tmp_path / "third")
        assert config["kv_cache_scheme"] == SCHEME


@pytest.mark.parametrize("verb", ["dense", "nf4"])
@pytest.mark.parametrize("format", NAMES)
def test_an_output_has_them_or_a_note_names_them(format: str, verb: str, tmp_path: Path) -> None:
    first, out = with_scales(tmp_path, format), tmp_path / "out"
    if verb == "dense":
        notes = fewbit.convert(first, out, to="dense", progress=False).notes
    else:
        notes = fewbit.quantize(first, out, plan="nf4", progress=False).notes
    if format == "compressed-tensors":
        assert set(NAMES[format]) <= models.tensors_of(out).keys()
        assert any(NAMES[format][0] in note for note in notes)
    else:  # these belong to linears that are not what they were
        count = sum(name.endswith(("input_scale", "k_scale", "v_scale")) for name in models.tensors_of(first))
        assert [
            note for note in notes if note.startswith(f"left out: {count} scales of activations or of the KV cache")
        ]
