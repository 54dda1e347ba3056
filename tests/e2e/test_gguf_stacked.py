"""Matrices of a GGUF file that are several of the model, one below the other, such as attn_qkv of Sarvam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.api import convert, generate, quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import Plan, Rule, find
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

QKV = "blk.0.attn_qkv.weight"
PARTS = tuple(f"model.layers.0.self_attn.{each}_proj" for each in "qkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save(tmp_path_factory.mktemp("stacked") / "m", "sarvam_moe")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    out = folder.parent / "m.gguf"
    quantize.quantize(folder, out, plan=find("q8_0").changed(method="rtn"))
    return out


def matrices(path: Path) -> list[torch.Tensor]:
    loaded = generate.load(path, dtype=torch.float32)
    found: list[Any] = [loaded.get_submodule(name) for name in PARTS]
    assert all(isinstance(each, QLinear) for each in found)
    return [each.qtensor().dequantize() for each in found]


def test_each_is_packed_and_saved_as_it_was(folder: Path, file: Path, tmp_path: Path) -> None:
    assert GgufFile(file).entries[QKV].shape == (128, 64)
    original = models.original(folder)
    for found, name, rows in zip(matrices(file), PARTS, (64, 32, 32), strict=True):
        wanted = original.get_parameter(f"{name}.weight")
        assert found.shape == (rows, 64)
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
    generate.load(file, dtype=torch.float32).save_pretrained(tmp_path)
    before, after = GgufFile(file), GgufFile(tmp_path / "model.gguf")
    assert before.entries == after.entries
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.entries)


def test_a_file_is_a_source(file: Path, tmp_path: Path) -> None:
    quantize.quantize(file, tmp_path / "again.gguf", plan=find("q8_0").changed(method="rtn"))
    assert torch.equal(GgufFile(tmp_path / "again.gguf").get(QKV), GgufFile(file).get(QKV))
    convert.convert(file, tmp_path / "folder", to="dense")
    decoded = models.original(tmp_path / "folder")
    for found, name in zip(matrices(file), PARTS, strict=True):
        assert torch.equal(found, decoded.get_parameter(f"{name}.weight"))


def test_they_have_one_type(folder: Path, tmp_path: Path) -> None:
    rules = (Rule("*.k_proj", "q8_0", "rtn"), Rule("*", "q4_0", "rtn"))
    with pytest.raises(PlanError, match=r"3 matrices of a layer in one tensor.*q_proj\.weight gets q4_0, .*k_proj"):
        quantize.quantize(folder, tmp_path / "out.gguf", plan=Plan("mine", "gguf", rules))
    assert not list(tmp_path.iterdir())


def test_they_share_their_importances(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(100), encoding="utf-8")
    quantize.imatrix(folder, tmp_path / "i.gguf", calibration=Calibration(text=str(text), samples=4, length=32))
    assert imatrix.read(tmp_path / "i.gguf")[QKV].mean_square.shape == (64,)
    plan = find("q4_0").changed(method="imatrix")
    done = quantize.quantize(folder, tmp_path / "out.gguf", plan=plan, imatrix=tmp_path / "i.gguf")
    assert not [note for note in done.notes if "no importances" in note]


def test_other_heights_are_refused(file: Path, tmp_path: Path) -> None:
    own = GgufFile(file)
    entries = [each._replace(shape=(96, 64)) if each.name == QKV else each for each in own.entries.values()]
    keys = own.metadata | {"bailingmoe2.attention.head_count_kv": 1}
    with GgufWriter(tmp_path / "few.gguf", keys, entries) as writer:
        for name in own.entries:
            writer.add(name, own.get(name)[:96] if name == QKV else own.get(name))
    with pytest.raises(
        FormatError, match=r"blk\.1\.attn_qkv\.weight has shape \[128, 64\], the model expects \[96, 64\]"
    ):
        generate.load(tmp_path / "few.gguf")
    with pytest.raises(FormatError, match=r"blk\.1\.attn_qkv\.weight has shape \[128, 64\], not 96 rows"):
        quantize.quantize(tmp_path / "few.gguf", tmp_path / "out.gguf", plan="q8_0")
