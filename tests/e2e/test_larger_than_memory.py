"""Quantizing needs the memory of one block: what was read of the checkpoint does not stay in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import fewbit
from fewbit.pipeline import blocks
from fewbit.report import text
from fewbit.system import machine
from tests import models
from tests.limits import HANG

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")

# Resident memory at the start, after each block and after writing, but before the output is opened.
MEASURED = """
import json, sys
import fewbit.api.quantize as verb
from fewbit.measure import memory
from fewbit.pipeline import settled, write_folder
from fewbit.plans.catalogue import catalogue
from fewbit.system import heap
catalogue()
heap.return_freed(1 << 16)
settled._PAGES = write_folder.SHARD_BYTES = write_folder.PAGES = 4 << 20
measured = []
sample = lambda *_: measured.append(memory.now().resident)
def unopened(*_):
    sample()
    return "", []
verb._reopened = unopened
model, out, small = sys.argv[1:]
verb.quantize(small, out + "-small", plan="nf4", progress=False)  # loads code, which counts as mapped too
measured.clear()
sample()
verb.quantize(model, out, plan="nf4", progress=sample)
print(json.dumps(measured))
"""


def made(folder: Path, layers: int) -> Path:
    """A mixture of experts of 8 MB a layer."""
    config = Qwen3MoeConfig(
        vocab_size=models.VOCAB,
        hidden_size=512,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="16MB")
    models.tokenizer().save_pretrained(folder)
    return folder


def test_an_output_larger_than_memory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that takes more memory than there is would be killed after all work, and again when it resumes."""
    model = made(tmp_path / "model", 1)
    monkeypatch.setattr(machine, "free_memory", lambda device: 1 << 20)
    done = fewbit.quantize(model, tmp_path / "out", plan="nf4", device="cpu")
    assert done.sample is None
    assert done.notes[-1].startswith("the output was not run: it has ")
    assert done.notes[-1].endswith("and cpu has 1.05 MB of free memory")
    text.quantized(done)
    assert "Reopened" not in capsys.readouterr().out
    monkeypatch.undo()
    assert fewbit.quantize(model, tmp_path / "ran", plan="nf4", device="cpu").sample is not None


def test_free_memory_is_less_than_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    free = machine.free_memory(cpu)
    assert free is not None
    assert 0 < free < machine.main_memory()

    def unknown(*_: object, **__: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unknown)
    assert machine.free_memory(cpu) == machine.main_memory()
    monkeypatch.setattr(machine, "main_memory", lambda: 0)
    assert machine.free_memory(cpu) is None


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    model, small = made(tmp_path / "model", 12), made(tmp_path / "small", 1)
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(model), str(tmp_path / "out"), str(small)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", timeout=HANG)
    before, *after = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert len(after) == 13
    assert size > 75e6
    assert max(after) - before < 0.4 * size, (before, after)


@pytest.mark.parametrize("plan", ["nf4", "gptq-4bit"])
def test_packed_weights_are_freed_when_they_are_saved(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_block, made, held = blocks._quantize_block, list[weakref.ref[Tensor]](), list[int]()

    def watched(*arguments: Any) -> Any:
        held.append(sum(tensor() is not None for tensor in made))
        done = quantize_block(*arguments)
        made.extend(weakref.ref(tensor) for tensor in done[0].values())
        return done

    monkeypatch.setattr(blocks, "_quantize_block", watched)
    folder = models.save(tmp_path / "model", "llama", num_hidden_layers=3)
    calibration = fewbit.Calibration([models.sentences(60)], samples=4, length=32)
    fewbit.quantize(folder, tmp_path / "out", plan=plan, calibration=calibration, device="cpu")
    assert made
    assert held == [0, 0, 0]
