"""Every verb reads the model that is named, whatever files of the same names lie in the working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fewbit
from fewbit.job import Calibration
from fewbit.models.source import locate
from fewbit.tuning import Tuning
from tests import gguf_files, models

NAME = "model.gguf"


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `sub`, relative to a working directory full of files that must not be read."""
    place = tmp_path / "place"
    gguf_files.written(gguf_files.save(place / "sub", "llama"), place / "sub" / NAME)
    decoy = gguf_files.save(tmp_path / "decoy", "gpt2")
    gguf_files.written(decoy, place / NAME)
    for file in decoy.iterdir():
        shutil.copy(file, place / file.name)
    (place / "pytorch_model.bin").write_bytes(b"not a model")
    (place / "adapter_config.json").write_text("{}", encoding="utf-8")
    shutil.copytree(decoy, place / "tiny")
    (place / "torch").mkdir()
    (place / "torch" / "__init__.py").write_text("raise ImportError('the decoy')", encoding="utf-8")
    monkeypatch.chdir(place)
    return Path("sub")


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(3, 40)[None]


def test_a_named_gguf_file_is_the_one_read(named: Path, ids: Tensor) -> None:
    model = str(named / NAME)
    expected = models.logits(models.original(named.absolute()), ids)
    torch.testing.assert_close(models.logits(fewbit.load(model, dtype=torch.float32), ids), expected, rtol=0, atol=1e-4)
    assert fewbit.inspect(model).share == fewbit.inspect(named.absolute() / NAME).share
    assert fewbit.generate(model, "the model", max_new_tokens=4).text == (
        fewbit.generate(named.absolute() / NAME, "the model", max_new_tokens=4).text
    )
    text = named.absolute().parent / "text.txt"
    text.write_text(models.sentences(60), encoding="utf-8")
    measured = fewbit.evaluate(model, reference=named, text=str(text), length=32, samples=2)
    assert measured.quality.kl is not None
    assert measured.quality.kl.mean.value < 1e-6


@pytest.mark.parametrize("form", [NAME, Path(NAME)])
def test_gguf_file_is_looked_for_in_the_folder(named: Path, ids: Tensor, form: str | Path) -> None:
    expected = models.logits(models.original(named.absolute()), ids)
    loaded = AutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=str(named), gguf_file=form, dtype=torch.float32
    )
    torch.testing.assert_close(models.logits(loaded, ids), expected, rtol=0, atol=1e-4)
    assert AutoConfig.from_pretrained(str(named), gguf_file=form).model_type == "llama"
    own = AutoTokenizer.from_pretrained(pretrained_model_name_or_path=str(named), gguf_file=form)
    assert own("the model")["input_ids"] == AutoTokenizer.from_pretrained(named)("the model")["input_ids"]


def test_a_named_folder_is_the_one_used(named: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(200), encoding="utf-8")
    windows = Calibration(str(text), 4, 32)
    fewbit.quantize(str(named), "out", plan="int8", calibration=windows)
    assert fewbit.inspect("out").share == fewbit.inspect(Path("out").absolute()).share
    fewbit.imatrix(str(named), "out.gguf", calibration=windows)
    fewbit.finetune("out", "adapter", data=str(text), tuning=Tuning(steps=1, length=32, batch=1))
    adapted = fewbit.evaluate("out", adapter="adapter", text=str(text), length=32, samples=1)
    assert adapted.model.startswith("out")
    fewbit.merge("out", "adapter", "merged", text=str(text), length=32, samples=1)
    assert Path("merged/model.safetensors").exists()


def test_tiny_is_a_name_and_a_path_is_a_path(named: Path) -> None:
    assert locate("tiny").config["model_type"] == "llama"
    assert locate("./tiny").config["model_type"] == "gpt2"
    assert locate(Path("tiny")).config["model_type"] == "gpt2"
