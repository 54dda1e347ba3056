"""HRM's blocks, which run several times: two lists of them, each block once in a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbit.api import generate, quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models.blocks import find_blocks
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import find
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

BLOCKS = [f"model.{stack}_module.layers.{place}" for stack in "LH" for place in range(2)]
PLAIN = find("q8_0").changed(method="rtn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save(tmp_path_factory.mktemp("cycles") / "m", "hrm_text")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    out = folder.parent / "m.gguf"
    quantize.quantize(folder, out, plan=PLAIN)
    return out


def test_the_blocks_of_both_lists_are_quantized(folder: Path, file: Path) -> None:
    original, loaded = models.original(folder), generate.load(file, dtype=torch.float32)
    assert find_blocks(original) == BLOCKS
    for place, block in enumerate(BLOCKS):
        linear: Any = loaded.get_submodule(f"{block}.self_attn.gate_proj")
        wanted = original.get_parameter(f"{block}.self_attn.gate_proj.weight")
        assert isinstance(linear, QLinear)
        assert GgufFile(file).entries[f"blk.{place}.attn_gate.weight"].type == "q8_0"
        assert float((linear.qtensor().dequantize() - wanted).norm() / wanted.norm()) < 0.01
    assert torch.equal(loaded.get_parameter("model.z_L_init"), original.get_parameter("model.z_L_init"))


def test_a_cache_has_the_keys_of_each_run(file: Path) -> None:
    loaded, ids = generate.load(file, dtype=torch.float32), gguf_files.ids(length=6)[:1]
    found = loaded.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2, eos_token_id=None)
    for length in range(6, 14):
        assert int(models.logits(loaded, found[:, :length])[0, -1].argmax()) == int(found[0, length])


def test_a_file_is_a_source(file: Path, tmp_path: Path) -> None:
    quantize.quantize(file, tmp_path / "again.gguf", plan=PLAIN)
    own, again = GgufFile(file), GgufFile(tmp_path / "again.gguf")
    assert own.entries == again.entries
    logits = [models.logits(generate.load(each.path, dtype=torch.float32), gguf_files.ids()) for each in (own, again)]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.05


@pytest.mark.parametrize("plan", ["q4_k_m", "gptq-4bit"])
def test_calibration_is_refused(plan: str, folder: Path, tmp_path: Path) -> None:
    few = Calibration(samples=2, length=32)
    out = tmp_path / ("m.gguf" if plan == "q4_k_m" else "m")
    said = r"runs model\.L_module\.layers\.0 \d+ times in 1 forward pass"
    with pytest.raises(PlanError, match=said):
        quantize.quantize(folder, out, plan=find(plan), calibration=few)
    assert not out.exists()


def test_an_importance_matrix_needs_no_calibration(folder: Path, tmp_path: Path) -> None:
    """That of llama.cpp has the inputs of a block in all of its runs."""
    entries, generator = GgufFile(gguf_files.written(folder, tmp_path / "m.gguf")).entries, torch.Generator()
    found = {
        name: imatrix.Importance(torch.rand(entry.shape[1], generator=generator.manual_seed(0)) + 0.1, 5)
        for name, entry in entries.items()
        if name.startswith("blk.")
    }
    imatrix.write(tmp_path / "matrix.gguf", found, chunks=1, length=64, text="x")
    done = quantize.quantize(folder, tmp_path / "q.gguf", plan=find("q4_0"), imatrix=tmp_path / "matrix.gguf")
    quantized = {each.module: each.method for each in done.tensors}
    assert all(quantized[f"{block}.mlp.down_proj"] == "imatrix" for block in BLOCKS)
    assert not any("no importances" in note for note in done.notes)


def test_another_number_of_runs_is_refused(folder: Path, file: Path, tmp_path: Path) -> None:
    config = CONFIG_MAPPING["hrm_text"].from_pretrained(folder)
    config.num_hidden_layers = 12
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 12
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(PlanError, match="a layer for each run of a block, here 16; this model's num_hidden_layers is"):
        gguf_files.header_of(tmp_path)
    own = GgufFile(file)
    many = {"hrm_text.hrm.h_cycles": 1 << 26, "hrm_text.block_count": 1 << 29}
    changed = {"hrm_text.block_count": 12}, {"hrm_text.hrm.layers_per_stack": 1, "hrm_text.block_count": 8}, many
    words = (
        "its blocks run 16 times, and that it has 12 layers",
        "it has 4 blocks of width 64, but its keys say 2",
        "its blocks run 536870912 times; llama.cpp runs at most 512 layers",
    )
    for keys, said in zip(changed, words, strict=True):
        with GgufWriter(tmp_path / "w.gguf", {**own.metadata, **keys}, list(own.entries.values()), overwrite=True) as w:
            for name in own.entries:
                w.add(name, own.get(name))
        with pytest.raises(FormatError, match=said):
            generate.load(tmp_path / "w.gguf")
