"""AWQ: its files load through transformers' own `from_pretrained`, packed, and are saved as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import api
from fewbit.formats.awq import AWQFormat
from fewbit.formats.safetensors import write_file
from fewbit.nn import QLinear
from fewbit.plan import find
from tests import models


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-sym"])
def test_files_load_packed_and_are_saved_as_they_were(family: str, scheme: str, ids: Tensor, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "original", family)
    plan = find("rtn-4bit").changed(scheme=scheme)
    api.quantize(folder, tmp_path / "gptq", plan=plan)
    api.quantize(folder, tmp_path / "awq", plan=plan.changed(format="awq"))
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq"
    assert config["modules_to_not_convert"] == ["lm_head"]
    same, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval() for name in ("gptq", "awq")
    )
    packed = [module for module in model.modules() if isinstance(module, QLinear)]
    assert len(packed) == len([module for module in same.modules() if isinstance(module, QLinear)]) > 0
    assert {str(module.codec) for module in packed} == {scheme}
    assert distance(models.logits(model, ids), models.logits(same, ids)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    before, after = models.tensors_of(tmp_path / "awq"), models.tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.to(after[name].dtype), after[name]) for name, tensor in before.items())
    again = fewbit.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(models.logits(again, ids), models.logits(model, ids))


def test_a_gemv_file_of_others_loads(ids: Tensor, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "original", "mistral")
    api.quantize(folder, tmp_path / "gemm", plan=find("rtn-4bit").changed(scheme="int4-g32", format="awq"))
    written = AWQFormat()
    config = json.loads((tmp_path / "gemm" / "config.json").read_text())["quantization_config"]
    gemm = models.tensors_of(tmp_path / "gemm")
    rest = {name: tensor for name, tensor in gemm.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    gemv = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMV"}
    for module in {name.rpartition(".")[0] for name in gemm.keys() - rest.keys()}:
        own = {suffix: gemm[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        laid_out = written.lay_out(written.read(own, config, module), gemv)
        rest |= {f"{module}.{suffix}": tensor for suffix, tensor in laid_out.items()}
    expected = models.logits(fewbit.load(tmp_path / "gemm", dtype=torch.float32), ids)
    write_file(tmp_path / "gemm" / "model.safetensors", rest)
    models.edit_json(tmp_path / "gemm" / "config.json", quantization_config=gemv)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemm", dtype=torch.float32).eval()
    assert torch.equal(models.logits(model, ids), expected)
