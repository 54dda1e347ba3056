"""A model with a vision tower is converted: towers, processor files, other heads and names survive."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fewbit as package
from fewbit.formats.containers import safetensors
from fewbit.plans.plan import Plan, Rule
from tests import models, multimodal
from tests.e2e.conftest import Fewbit

TOWER = "model.visual."
MTP = {"mtp.fc.weight": torch.rand(8, 8), "mtp.layers.0.self_attn.q_proj.weight": torch.rand(8, 8).bfloat16()}
FILES = {"preprocessor_config.json": '{"size": 224}', "video_preprocessor_config.json": '{"fps": 2}'}


def test_towers_files_and_names_survive(fewbit: Fewbit, tmp_path: Path) -> None:
    model = multimodal.save(tmp_path / "model", "qwen3_5")
    for name, text in FILES.items():
        (model / name).write_text(text, encoding="utf-8")
    save_file({**load_file(model / "model.safetensors"), **MTP}, model / "model.safetensors", metadata={"format": "pt"})
    original = models.tensors_of(model)
    plan = Plan("p", "gptq", (Rule("*", "int4-g32-sym", "rtn"),))
    package.quantize(model, tmp_path / "first", plan=plan, progress=False)
    done = package.convert(tmp_path / "first", tmp_path / "second", to="compressed-tensors", progress=False)
    assert done.exact
    assert any("mtp.fc.weight" in note for note in done.notes)
    package.convert(tmp_path / "second", tmp_path / "third", to="gptq", progress=False)
    package.convert(tmp_path / "first", tmp_path / "dense", to="dense", progress=False)
    first, second, third, dense = (models.tensors_of(tmp_path / each) for each in ("first", "second", "third", "dense"))

    assert any(name.startswith(TOWER) for name in original)
    quantized = {name for name in original if name not in first}
    assert quantized
    for name, tensor in original.items():
        if name not in quantized:
            for made in (first, second, third, dense):
                assert made[name].dtype == tensor.dtype, name
                assert torch.equal(made[name], tensor), name
    assert set(dense) == set(original)
    assert {name.rpartition(".")[0] for name in second} == {name.rpartition(".")[0] for name in first}
    assert first.keys() == third.keys()
    assert not [name for name in first if not torch.equal(first[name], third[name])]

    for out in ("second", "third", "dense"):
        files = {str(path) for path in safetensors.side_files(tmp_path / out)}
        assert {str(path) for path in safetensors.side_files(model)} <= files
        assert all((tmp_path / out / name).read_text(encoding="utf-8") == text for name, text in FILES.items())
    one, two = (
        package.load(tmp_path / each, dtype=torch.float32, device="cpu", kernel="reference")
        for each in ("first", "second")
    )
    assert type(two) is type(models.original(model))
    inputs = multimodal.inputs("qwen3_5", one)
    assert "pixel_values" in inputs
    with torch.inference_mode():
        wanted, found = one(**inputs).logits, two(**inputs).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    refused = fewbit("convert", tmp_path / "first", "-o", tmp_path / "out.gguf", "--to", "gguf")
    assert (refused.code, "has a vision or audio tower" in refused.err) == (2, True)
