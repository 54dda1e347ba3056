"""Adapters and GGUF: a LoRA merged into a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewbit as package
from fewbit.api import quantize
from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models import merge as merging
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.scales import GGUF_RECORD
from tests import models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_bad_input import check

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 288, "dtype": "float32"}
IDS = torch.arange(40, dtype=torch.int64)[None] % 250


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("gguf-adapters") / "model", "llama", **SHAPE)


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    out = model.parent / "packed.gguf"
    quantize.quantize(model, out, plan="q5_k_m", calibration=[models.sentences(40)])
    return out


@pytest.fixture(scope="module")
def adapter(packed: Path, text: Path) -> Path:
    """Trained on the packed weights of the file."""
    out = packed.parent / "adapter"
    tuning = Tuning(length=32, batch=8, learning_rate=0.01, steps=8, rank=4)
    done = package.finetune(packed, out, data=str(text), tuning=tuning)
    assert done.held_out_before is not None
    assert done.held_out_after is not None
    assert done.held_out_after < 0.9 * done.held_out_before
    return out


# --- merged into a file ---


def tensors(path: Path) -> dict[str, Any]:
    file = GgufFile(path)
    return {name: np.asarray(file.get(name)) for name in file.entries}


def test_a_merge_makes_the_file_of_the_merged_folder(
    model: Path, packed: Path, adapter: Path, text: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    out, measured = tmp_path / "out.gguf", ("--text", text, "--length", 32, "--json")
    calibrated = ("--plan", "q4_k_m", "--calibration", text)
    answer = fewbit("merge", packed, adapter, "-o", out, *calibrated, "--base", model, *measured)
    assert answer.code == 0, answer.err
    assert 0 < answer.json["evaluation"]["kl"]["mean"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert fewbit("merge", packed, adapter, "-o", tmp_path / "16", "--base", model, *measured).code == 0
    assert fewbit("quantize", tmp_path / "16", "-o", tmp_path / "wanted.gguf", *calibrated).code == 0
    found, wanted = tensors(out), tensors(tmp_path / "wanted.gguf")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert answer.json["nbytes"] == GgufFile(out).nbytes
    keys = GgufFile(out).metadata
    assert keys["general.name"] == "model with adapter"
    record = json.loads(keys[GGUF_RECORD])
    assert (record["model"], record["origin"]) == (f"{model} with {adapter}", None)
    assert "/merged/" not in keys[GGUF_RECORD]
    assert {entry.type for entry in GgufFile(out).entries.values()} >= {"q4_k", "q6_k"}


def test_an_adapter_of_a_file_is_merged_into_its_values(packed: Path, adapter: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(packed.read_bytes().replace(b'"origin": "', b'"0rigin": "'))
    done = package.merge(alone, adapter, tmp_path / "out.gguf", plan="q8_0", text=[models.sentences(60)], length=32)
    assert done.base is None
    assert done.evaluation.quality.kl is not None
    assert done.evaluation.quality.kl.mean.value < 0.01
    exact: dict[str, Any] = {"dtype": "float32", "kernel": "reference"}
    merged = models.logits(package.load(tmp_path / "out.gguf", **exact), IDS)
    both = models.logits(package.load(alone, adapter=adapter, **exact), IDS)
    before = models.logits(package.load(alone, **exact), IDS)
    assert (merged - both).norm() < 0.2 * (before - both).norm()  # q8_0 rounds the sum


def test_what_cannot_be_merged_into_a_file(
    model: Path, packed: Path, adapter: Path, tmp_path: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(merging, "write_merged", work)
    place = tmp_path / "out.gguf"
    check(fewbit("merge", packed, adapter, "-o", place), 2, "without a plan merge makes a folder", "--plan q4_k_m")
    check(fewbit("merge", packed, adapter, "-o", tmp_path / "out", "--plan", "q4_k_m"), 2, "ends in .gguf")
    place.write_text("mine", encoding="utf-8")
    check(fewbit("merge", packed, adapter, "-o", place, "--plan", "q4_k_m"), 2, "exists")
    opt = models.save(tmp_path / "opt", "opt")
    with pytest.raises(PlanError, match=r"no GGUF file can be made of a model of type 'opt'"):
        package.merge(opt, adapter, tmp_path / "opt.gguf", plan="q4_k_m", text=[models.sentences(60)], length=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opt", "out.gguf"]
