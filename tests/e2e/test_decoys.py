"""Relative names mean the same in every verb, whatever else lies in the working directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fewbit as package
from fewbit.api import compare, compare_worker
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.source import locate
from fewbit.system import processes
from fewbit.system.processes import OnMessage, Server
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

TUNING = Tuning(rank=2, steps=1, length=16, learning_rate=0.5)
SHORT: dict[str, Any] = {"length": 32, "samples": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder that holds `sub` with what is asked for, and beside it other things of the same names."""
    place = tmp_path_factory.mktemp("decoys")
    sub = place / "sub"
    gguf_files.save(sub / "m", "llama", dtype="float32")
    gguf_files.written(sub / "m", sub / "model.gguf", "q8_0")
    other = gguf_files.save(place / "m", "llama", dtype="float32", hidden_size=32, intermediate_size=64)
    gguf_files.written(other, place / "model.gguf", "q4_0")
    package.finetune(sub / "m", sub / "adapter", data=str(text), tuning=TUNING)
    package.finetune(other, place / "adapter", data=str(text), tuning=TUNING)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"):
        (place / name).write_text("{", encoding="utf-8")
    for name in ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"):
        (place / name).write_bytes(b"no tensors")
    for name in ("tiny", "smollm2"):
        (place / name).mkdir()
        (place / name / "config.json").write_text((other / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("torch", "tokenizers", "fewbit", "random"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("raise SystemExit('the wrong module was imported')", encoding="utf-8")
    return place


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


class Here(Server):
    """A server that does its tasks in this process; the other says nothing of warnings either."""

    def run(self, task: Mapping[str, Any], on_message: OnMessage) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"quantize": compare_worker.quantize, "measure": compare_worker.measure}[task["do"]](
                task, on_message
            )


def verbs(sub: Path, out: Path, text: Path) -> dict[str, Any]:
    """What each verb says of the model in `sub`."""
    file, folder, adapter = sub / "model.gguf", str(sub / "m"), sub / "adapter"
    said: dict[str, Any] = {}
    loaded = package.load(file)
    said["load"] = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    said["adapter"] = models.logits(package.load(file, adapter=adapter), gguf_files.ids())
    said["generate"] = package.generate(str(file), "the model", max_new_tokens=8).text
    said["evaluate"] = package.evaluate(file, reference=folder, text=str(text), **SHORT).quality.kl
    said["inspect"] = package.inspect(file).schemes, package.inspect(folder).parameters
    said["estimate"] = package.estimate(folder, plan="q4_0").parameters
    package.quantize(folder, out / "q.gguf", plan="q4_0")
    made = GgufFile(out / "q.gguf")
    said["quantize"] = {name: made.get(name) for name in made.entries}
    calibration = Calibration(str(text), samples=1, length=16)
    package.imatrix(folder, out / "i.gguf", calibration=calibration)
    said["imatrix"] = GgufFile(out / "i.gguf").nbytes
    package.finetune(file, out / "adapter", data=str(text), tuning=TUNING)
    said["finetune"] = models.tensors_of(out / "adapter")
    package.merge(file, adapter, out / "merged", text=str(text), **SHORT)
    said["merge"] = models.tensors_of(out / "merged")
    compared = package.compare(folder, plans=["rtn-4bit"], text=str(text), **SHORT)
    (row,) = compared.rows
    assert row.loss is not None, row.reason
    said["compare"] = row.loss.kl
    named = {"gguf_file": file.name}
    said["from_pretrained"] = dict(AutoModelForCausalLM.from_pretrained(sub, **named).state_dict())
    said["config"] = AutoConfig.from_pretrained(sub, **named).hidden_size
    said["tokenizer"] = AutoTokenizer.from_pretrained(sub, **named).get_vocab()
    return said


def test_every_verb_reads_what_the_name_says(
    place: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "Server", Here)
    (tmp_path / "clean").mkdir()
    monkeypatch.chdir(tmp_path / "clean")
    wanted = verbs(place / "sub", tmp_path / "wanted", text)
    monkeypatch.setenv("FEWBIT_CACHE", "cache")
    monkeypatch.chdir(place)
    found = verbs(Path("sub"), tmp_path / "found", text)
    for verb, said in wanted.items():
        if isinstance(said, dict) and said and isinstance(next(iter(said.values())), torch.Tensor):
            assert said.keys() == found[verb].keys(), verb
            assert all(torch.equal(tensor, found[verb][name]) for name, tensor in said.items()), verb
        elif isinstance(said, torch.Tensor):
            assert torch.equal(said, found[verb]), verb
        else:
            assert found[verb] == said, verb
    base = json.loads((tmp_path / "found" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ]
    assert base == str(place / "sub" / "model.gguf")


def test_a_folder_called_tiny_is_not_tiny(there: Path) -> None:
    """The name is the embedded model's, a path is the folder's."""
    original = locate("tiny").folder
    assert original.is_relative_to(Path(package.__file__).parent)
    assert package.estimate("tiny", plan="q4_0").parameters > package.estimate("./tiny", plan="q4_0").parameters
    shutil.copytree(there / "sub" / "m", there / "smollm2", dirs_exist_ok=True)
    assert locate(Path("smollm2")).folder == there / "smollm2"
    assert locate("./smollm2").address == str(there / "smollm2")
    assert locate("tiny").address == "tiny"


def test_a_file_that_the_folder_lacks_is_not_looked_for_here(there: Path) -> None:
    (there / "other.gguf").symlink_to(there / "model.gguf")
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"other\.gguf"):
            kind.from_pretrained("sub", gguf_file="other.gguf")


def test_a_merge_finds_its_base_from_anywhere(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.quantize("sub/m", tmp_path / "made", plan="rtn-4bit")
    monkeypatch.chdir(tmp_path)
    gguf_files.save(Path("sub/m"), "llama", dtype="float32", hidden_size=32, intermediate_size=64)
    merged = package.merge("made", there / "sub" / "adapter", "merged", text=None, **SHORT)
    assert merged.base == str(there / "sub" / "m")


def test_a_process_imports_no_module_from_here(there: Path) -> None:
    script = "import os, sys; assert os.getcwd() not in [os.path.abspath(p) for p in sys.path], sys.path"
    (there / "own").mkdir()
    (there / "own" / "probe.py").write_text(script, encoding="utf-8")
    environment = {**processes.environment(), "PYTHONPATH": str(there / "own")}
    run = subprocess.run(processes.command("probe"), env=environment, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("file", ["model.gguf", Path("model.gguf")])
def test_the_folder_may_be_given_by_keyword(there: Path, file: str | Path) -> None:
    named: dict[str, Any] = {"pretrained_model_name_or_path": "sub", "gguf_file": file}
    model = AutoModelForCausalLM.from_pretrained(**named)
    expected = AutoModelForCausalLM.from_pretrained(there / "sub", gguf_file=str(there / "sub" / "model.gguf"))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(models.logits(model, ids), models.logits(expected, ids))
    assert AutoTokenizer.from_pretrained(**named)("the")["input_ids"]
