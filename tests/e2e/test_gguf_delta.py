"""Kimi Linear's linear attention (KDA) in GGUF files: three convolutions that are one of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit.api import generate, quantize
from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.formats.containers.safetensors import read_file
from fewbit.plans.plan import find
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

CONV, A_LOG = "model.layers.0.self_attn.conv1d.weight", "model.layers.0.self_attn.forget_gate.A_log"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save(tmp_path_factory.mktemp("delta") / "m", "kimi_linear")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    out = folder.parent / "m.gguf"
    quantize.quantize(folder, out, plan=find("q8_0").changed(method="rtn"))
    return out


def test_convolutions_of_a_checkpoint_are_written(folder: Path, file: Path) -> None:
    stored, own = read_file(folder / "model.safetensors")[0], GgufFile(file)
    for which in "qkv":
        wanted = stored[f"model.layers.2.self_attn.{which}_conv1d.weight"]
        found = own.get(f"blk.2.ssm_conv1d_{which}.weight")
        assert found.shape == (128, 1, 4)
        assert torch.equal(found, wanted)
    assert own.entries["blk.2.ssm_a"].shape == (4, 1)
    assert own.entries["blk.2.ssm_a"].type == "f32"
    loaded, original = generate.load(file, dtype=torch.float32), models.original(folder)
    assert torch.equal(loaded.get_parameter(CONV), original.get_parameter(CONV))
    torch.testing.assert_close(loaded.get_parameter(A_LOG), original.get_parameter(A_LOG))


def test_a_calibrated_file_is_closer(folder: Path, file: Path, tmp_path: Path) -> None:
    """The blocks run one by one, those with linear attention too."""
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(100), encoding="utf-8")
    few, ids = (
        Calibration(text=str(text), samples=8, length=64),
        models.tokenizer()(models.sentences(20), return_tensors="pt")["input_ids"][:, :64],
    )
    wanted = models.logits(models.original(folder), ids)
    errors = {}
    for method in ("rtn", "gptq"):
        out = tmp_path / f"{method}.gguf"
        quantize.quantize(folder, out, plan=find("q4_0").changed(method=method), calibration=few)
        errors[method] = float((models.logits(generate.load(out, dtype=torch.float32), ids) - wanted).norm())
    assert errors["gptq"] < errors["rtn"]


def test_shapes_of_llama_cpps_converter_are_read_and_saved(file: Path, tmp_path: Path) -> None:
    own = GgufFile(file)
    more = {name: (1,) * (4 - len(entry.shape)) for name, entry in own.entries.items() if "ssm_conv" in name}
    more |= {name: (1, 1) for name in own.entries if name.endswith("ssm_a")}
    entries = [each._replace(shape=(*more.get(each.name, ()), *each.shape)) for each in own.entries.values()]
    with GgufWriter(tmp_path / "theirs.gguf", own.metadata, entries) as writer:
        for each in entries:
            writer.add(each.name, own.get(each.name).view(each.spec.shape))
    loaded, ids = generate.load(tmp_path / "theirs.gguf", dtype=torch.float32), gguf_files.ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(generate.load(file, dtype=torch.float32), ids))
    loaded.save_pretrained(tmp_path / "saved")
    saved, theirs = GgufFile(tmp_path / "saved" / "model.gguf"), GgufFile(tmp_path / "theirs.gguf")
    assert saved.entries == theirs.entries
    assert all(torch.equal(saved.get(name), theirs.get(name)) for name in theirs.entries)
    quantize.quantize(tmp_path / "theirs.gguf", tmp_path / "again.gguf", plan=find("q8_0").changed(method="rtn"))
    assert torch.equal(GgufFile(tmp_path / "again.gguf").get("blk.0.ssm_a"), own.get("blk.0.ssm_a"))


def test_other_linear_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="linear_num_heads"):
        gguf_files.header_of(gguf_files.save(tmp_path / "m", "kimi_linear", linear_num_heads=2))
