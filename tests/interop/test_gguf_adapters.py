"""Adapters as GGUF files: llama.cpp adds those of fewbit, and fewbit reads those of llama.cpp's own converter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbit.api import convert
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.adapters.attach import attach
from tests import gguf_files, models
from tests.e2e.test_gguf_adapters import drawn, unpacked
from tests.interop import converter
from tests.interop.llama_cpp import opened

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

# What its converter cannot: it exchanges the matrices of Conv1D, and it asks for MTP blocks of Qwen.
OURS_ONLY = {"gpt2", "qwen3_5_text", "qwen3_next", "mixtral", "phi", "sarvam_moe", "kimi_linear"}
# Modules that PEFT or llama.cpp leaves out, of each family; all others are trained.
TARGETS: dict[str, str] = {
    "llama": r".*(q|k|v|o|gate|up|down)_proj",
    "mistral": r".*(q|k|v|o|gate|up|down)_proj|lm_head",
    "qwen2": r".*(q|k|v|o|gate|up|down)_proj",
    "gemma2": r".*(q|k|v|o|gate|up|down)_proj",
    "phi3": r".*(qkv|o|gate_up|down)_proj",
    "gpt2": r".*(c_attn|c_proj|c_fc)",
    "mixtral": r".*(q_proj|experts\.\d\.w\d)",
    "qwen3_5_text": r".*(in_proj_qkv|in_proj_z|linear_attn\.out_proj|q_proj|down_proj)",
    "qwen3_next": r".*(in_proj_qkvz|in_proj_ba|linear_attn\.out_proj|q_proj|shared_expert\.down_proj)",
    "phi": r".*(embed_tokens|q_proj|dense|lm_head)",
    "sarvam_moe": r".*(q|k|o)_proj",
    "kimi_linear": r".*(shared_experts\.down_proj|experts\.\d\.w2)",
}


@pytest.mark.parametrize("family", [*TARGETS, "mistral-in-mistral3"])
def test_llama_cpp_adds_ours(family: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="make interop installs llama-cpp-python")
    family, _, name = family.partition("-in-")
    folder = gguf_files.save(tmp_path / "m", family, **({"sliding_window": None} if name else {}))
    file = gguf_files.written(folder, tmp_path / "m.gguf")
    file = gguf_files.renamed(file, tmp_path / "other.gguf", name) if name else file
    adapter = drawn(folder, tmp_path / "adapter", target_modules=TARGETS[family], rank_pattern={"q_proj": 3})
    convert.convert(adapter, tmp_path / "lora.gguf", to="gguf", base=file if name else folder)
    ids = gguf_files.ids(length=14)[0]
    options: dict[str, Any] = {"n_ctx": 64, "logits_all": True, "type_k": 0, "type_v": 0}
    llama = opened(file, lora_path=str(tmp_path / "lora.gguf"), **options)
    llama.eval(ids.tolist())
    found = torch.from_numpy(np.array(llama.scores[: len(ids)]))
    added, plain = attach(unpacked(folder), adapter), unpacked(folder)
    wanted, before = models.logits(added, ids[None])[0], models.logits(plain, ids[None])[0]
    gelu = any("gelu" in str(value) for value in plain.config.to_dict().values())  # a table of 16-bit numbers
    assert float((found - wanted).norm() / wanted.norm()) < (1e-3 if gelu else 1e-5)
    assert float((before - wanted).norm() / wanted.norm()) > 0.1


_CONVERTED = [(family, "f32") for family in TARGETS if family not in OURS_ONLY] + [("llama", "f16"), ("llama", "q8_0")]


@pytest.mark.skipif(not converter.SDIST.exists(), reason="make interop downloads llama.cpp's source")
@pytest.mark.parametrize(("family", "kind"), _CONVERTED)
def test_its_own_converter_makes_the_same(family: str, kind: str, tmp_path: Path) -> None:
    source = converter.unpacked(tmp_path)
    folder = gguf_files.save(tmp_path / "m", family)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | converter.PUBLISHED.get(family, {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = drawn(folder, tmp_path / "adapter", target_modules=TARGETS[family])
    command: list[str | Path] = [
        sys.executable,
        source / "convert_lora_to_gguf.py",
        adapter,
        "--base",
        folder,
        "--outtype",
        kind,
    ]
    done = subprocess.run(
        [*command, "--outfile", tmp_path / "theirs.gguf"], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    convert.convert(adapter, tmp_path / "ours.gguf", to="gguf", base=folder)
    theirs, ours = GgufFile(tmp_path / "theirs.gguf"), GgufFile(tmp_path / "ours.gguf")
    ids = gguf_files.ids(length=14)[:1]
    found, wanted = (models.logits(attach(unpacked(folder), each), ids) for each in (theirs.path, adapter))
    assert float((found - wanted).norm() / wanted.norm()) < {"f32": 1e-6, "f16": 1e-3, "q8_0": 2e-2}[kind]
    if kind == "f32":
        assert theirs.entries.keys() == ours.entries.keys()
        assert all(torch.equal(theirs.get(name), ours.get(name)) for name in theirs.entries)
        for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
            assert theirs.metadata[key] == ours.metadata[key]
