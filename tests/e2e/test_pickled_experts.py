"""Packed models with experts as pickles: whole models in torch.save, and in the processes that spawn starts."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.api import generate, quantize
from fewbit.models import experts
from fewbit.nn.experts import ExpertSlice
from fewbit.plans.plan import find
from tests import gguf_files, models

KINDS = ("qwen3_moe", "gpt_oss", "llama4_text")  # llama4's experts get every token
_OTHER_PROCESS = """
import pickle, sys
from pathlib import Path
with open(sys.argv[1], "rb") as file:
    model, ids = pickle.load(file)
Path(sys.argv[2]).write_bytes(pickle.dumps(model(input_ids=ids, use_cache=False).logits))
"""


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save(tmp_path_factory.mktemp("pickled") / request.param, request.param)


def packed(folder: Path, to: Path, plan: str) -> Any:
    quantize.quantize(folder, to, plan=find(plan).changed(method="rtn") if to.suffix else plan)
    return generate.load(to, dtype=torch.float32)


def saved(model: Any) -> Any:
    """The model after torch.save and torch.load."""
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


@pytest.mark.parametrize(("name", "plan"), [("m.gguf", "q8_0"), ("folder", "nf4")])
def test_a_copy_computes_the_same(folder: Path, name: str, plan: str, tmp_path: Path) -> None:
    model, ids = packed(folder, tmp_path / name, plan), gguf_files.ids()[:, :12]
    assert any(isinstance(module, ExpertSlice) for module in model.modules())
    wanted = models.logits(model, ids)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)):
        assert torch.equal(models.logits(made, ids), wanted)
        one, two = ([m for m in each.modules() if isinstance(m, experts.SeparateExperts)] for each in (model, made))
        assert [type(m).__name__ for m in one] == [type(m).__name__ for m in two]
        assert not {id(m) for m in one} & {id(m) for m in two}
    assert torch.equal(models.logits(model, ids), wanted)


def test_another_process_reads_it(folder: Path, tmp_path: Path) -> None:
    """As multiprocessing with spawn does: nothing of fewbit is imported there before."""
    model, ids = packed(folder, tmp_path / "m.gguf", "q8_0"), gguf_files.ids()[:, :12]
    (tmp_path / "model").write_bytes(pickle.dumps((model, ids)))
    command: list[str | Path] = [sys.executable, "-c", _OTHER_PROCESS, tmp_path / "model", tmp_path / "logits"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = pickle.loads((tmp_path / "logits").read_bytes())
    torch.testing.assert_close(found, models.logits(model, ids))


def test_a_copy_is_dequantized_and_saved(folder: Path, tmp_path: Path) -> None:
    model, ids = packed(folder, tmp_path / "m.gguf", "q8_0"), gguf_files.ids()[:, :12]
    made = pickle.loads(pickle.dumps(model))
    made.save_pretrained(tmp_path / "saved")
    again = generate.load(tmp_path / "saved" / "model.gguf", dtype=torch.float32)
    assert torch.equal(models.logits(again, ids), models.logits(model, ids))
    plain = made.dequantize()
    assert not any(isinstance(module, experts.SeparateExperts) for module in plain.modules())
    torch.testing.assert_close(models.logits(plain, ids), models.logits(model, ids), rtol=1e-4, atol=1e-4)
