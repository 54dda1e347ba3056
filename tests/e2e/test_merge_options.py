"""What `fewbit merge` takes of `quantize` besides a plan: an importance matrix, and a size to split a GGUF file at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.formats.containers import imatrix
from fewbit.models import merge as merging
from tests import models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_bad_input import check
from tests.e2e.test_gguf_adapters import SHAPE, drawn, tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("merge-options") / "model", "llama", **SHAPE)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return drawn(model, model.parent / "adapter", target_modules=["q_proj", "down_proj"])


def test_a_merge_quantizes_as_the_merged_folder(
    model: Path, adapter: Path, text: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    matrix, measured = tmp_path / "imatrix.gguf", ("--text", text, "--length", 32)
    assert fewbit("imatrix", model, "-o", matrix, "--calibration", text, "--samples", 4).code == 0
    chosen, out = ("--plan", "q4_k_m", "--imatrix", matrix, "--max-shard", "300kB"), tmp_path / "parts" / "m.gguf"
    out.parent.mkdir()
    merged = fewbit("merge", model, adapter, "-o", out, *chosen, *measured, "--json")
    assert merged.code == 0, merged.err
    assert fewbit("merge", model, adapter, "-o", tmp_path / "16", *measured).code == 0
    (tmp_path / "wanted").mkdir()
    wanted = fewbit("quantize", tmp_path / "16", "-o", tmp_path / "wanted" / "m.gguf", *chosen, "--json")
    assert wanted.code == 0, wanted.err
    one, two = (Path(each.json["out"]) for each in (merged, wanted))
    assert one.name == two.name
    assert one.name.startswith("m-00001-of-")
    assert len(list(one.parent.iterdir())) == len(list(two.parent.iterdir())) > 1
    own, theirs = tensors(one), tensors(two)
    assert own.keys() == theirs.keys()
    assert all(np.array_equal(own[name], theirs[name]) for name in theirs)
    plain = ("merge", model, adapter, "-o", tmp_path / "plain.gguf", "--plan", "q4_k_m", *measured)
    assert fewbit(*plain, "--calibration", text).code == 0
    assert any(not np.array_equal(own[name], other) for name, other in tensors(tmp_path / "plain.gguf").items())
    check(fewbit("merge", model, adapter, "-o", out, *chosen, *measured), 2, "m-00001-of-", "exists", "--overwrite")


def test_what_does_not_fit_is_refused_before_any_work(
    model: Path, adapter: Path, tmp_path: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed.gguf"
    assert fewbit("quantize", model, "-o", packed, "--plan", "q8_0", "--method", "rtn").code == 0

    def work(*args: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(merging, "write_merged", work)
    folder, file = ("-o", tmp_path / "out"), ("-o", tmp_path / "out.gguf", "--plan", "q4_k_m")
    other = tmp_path / "other.gguf"
    imatrix.write(other, {"blk.0.attn_q.weight": imatrix.Importance(torch.ones(7), 3)}, chunks=1, length=8, text="t")
    for base in (model, packed):
        begun = ("merge", base, adapter)
        check(fewbit(*begun, *folder, "--max-shard", "1GB"), 2, "--max-shard splits GGUF files", "is a folder")
        check(fewbit(*begun, *folder, "--imatrix", other), 2, "without a plan merge quantizes nothing")
        check(fewbit(*begun, *file, "--imatrix", other), 3, "blk.0.attn_q.weight has 7 importances")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf", "packed.gguf"]
