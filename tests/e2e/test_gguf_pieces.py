"""Matrices that a GGUF file has in pieces: of one type, of different types, and whole as in files of earlier times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.api import generate, quantize
from fewbit.errors import FormatError
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.methods.base import Method
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import find
from fewbit.schemes.base import parse
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

MODULE = "model.layers.0.linear_attn.in_proj_qkvz"
QKV, GATE, WHOLE = (f"blk.0.{name}.weight" for name in ("attn_qkv", "attn_gate", "ssm_in"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save(tmp_path_factory.mktemp("pieces") / "m", "qwen3_next")


@pytest.fixture(scope="module")
def original(folder: Path) -> torch.Tensor:
    found: torch.Tensor = models.original(folder).get_parameter(f"{MODULE}.weight").detach()
    return found


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return gguf_files.written(folder, folder.parent / "m.gguf", "q8_0")


def changed(path: Path, to: Path, tensors: dict[str, tuple[Entry, torch.Tensor] | None]) -> Path:
    """The file with other tensors; None drops one."""
    own = GgufFile(path)
    kept = {name: (entry, own.get(name)) for name, entry in own.entries.items() if name not in tensors}
    kept |= {name: new for name, new in tensors.items() if new is not None}
    with GgufWriter(to, own.metadata, [entry for entry, _ in kept.values()]) as writer:
        for entry, tensor in kept.values():
            writer.add(entry.name, tensor)
    return to


def packed(name: str, spec: str, weight: torch.Tensor) -> tuple[Entry, torch.Tensor]:
    blocks = Method().quantize(weight, parse(spec), None).weight.parts["blocks"]
    return Entry(name, spec, (weight.shape[0], weight.shape[1])), blocks


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_pieces_of_one_type_are_one_packed_weight(file: Path, original: torch.Tensor, tmp_path: Path) -> None:
    assert {GgufFile(file).entries[name].type for name in (QKV, GATE)} == {"q8_0"}
    loaded = generate.load(file, dtype=torch.float32)
    linear: Any = loaded.get_submodule(MODULE)
    assert isinstance(linear, QLinear)
    assert error(linear.qtensor().dequantize(), original) < 0.01
    loaded.save_pretrained(tmp_path)
    before, after = GgufFile(file), GgufFile(tmp_path / "model.gguf")
    assert before.entries == after.entries
    assert all(torch.equal(before.get(name), after.get(name)) for name in (QKV, GATE))


def test_pieces_of_two_types_are_decoded(file: Path, original: torch.Tensor, tmp_path: Path) -> None:
    # Two key heads: 16 queries, 16 keys, 32 values and 32 gates each
    gates = original.view(2, 96, 64)[:, 64:].reshape(64, 64)
    path = changed(file, tmp_path / "mixed.gguf", {GATE: packed(GATE, "q4_0", gates)})
    loaded = generate.load(path, dtype=torch.float32)
    found = loaded.get_submodule(MODULE).get_parameter("weight").detach()
    rows = torch.arange(192).view(2, 96)
    assert error(found[rows[:, :64].flatten()], original[rows[:, :64].flatten()]) < 0.01
    assert 0.02 < error(found[rows[:, 64:].flatten()], original[rows[:, 64:].flatten()]) < 0.2
    loaded.save_pretrained(tmp_path / "saved")
    before, after = GgufFile(path), GgufFile(tmp_path / "saved" / "model.gguf")
    assert before.entries == after.entries
    assert all(torch.equal(before.get(name), after.get(name)) for name in (QKV, GATE))
    quantize.quantize(path, tmp_path / "again.gguf", plan=find("q8_0").changed(method="rtn"))
    again: Any = generate.load(tmp_path / "again.gguf", dtype=torch.float32).get_submodule(MODULE)
    assert error(again.qtensor().dequantize(), found) < 0.01


def test_a_file_that_has_the_matrix_whole_is_read(file: Path, original: torch.Tensor, tmp_path: Path) -> None:
    whole = {QKV: None, GATE: None, WHOLE: packed(WHOLE, "q8_0", original)}
    loaded = generate.load(changed(file, tmp_path / "whole.gguf", whole), dtype=torch.float32)
    ids = gguf_files.ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(generate.load(file, dtype=torch.float32), ids))


def test_pieces_that_do_not_fit_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"it has {QKV}, but not {GATE}"):
        generate.load(changed(file, tmp_path / "a.gguf", {GATE: None}))
    with pytest.raises(FormatError, match=rf"{GATE} has shape \[32, 64\], the model expects \[64, 64\]"):
        generate.load(changed(file, tmp_path / "b.gguf", {GATE: packed(GATE, "q8_0", torch.ones(32, 64))}))


def test_pieces_share_their_importances(folder: Path, file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(100), encoding="utf-8")
    wanted = Calibration(text=str(text), samples=4, length=32)
    quantize.imatrix(folder, tmp_path / "imatrix.gguf", calibration=wanted)
    found = imatrix.read(tmp_path / "imatrix.gguf")
    assert torch.equal(found[QKV].mean_square, found[GATE].mean_square)
    assert WHOLE not in found
    plan = find("q4_0").changed(method="imatrix")
    done = quantize.quantize(folder, tmp_path / "out.gguf", plan=plan, imatrix=tmp_path / "imatrix.gguf")
    assert not [note for note in done.notes if "no importances" in note]
