"""On an NVIDIA GPU: a GGUF file is loaded there packed, moved between devices, and gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.formats.containers.gguf import GgufFile
from tests import gguf_files, models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3"])
def test_packed_there_as_here(family: str, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", family, tie_word_embeddings=True)
    path = gguf_files.written(folder, tmp_path / "m.gguf", "q8_0")
    ids = gguf_files.ids()
    here = fewbit.load(path, device="cpu")
    there: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", device_map="cuda")
    assert all(parameter.device.type == "cuda" for parameter in there.parameters())
    assert sum(p.numel() * p.element_size() for p in there.parameters()) == GgufFile(path).nbytes
    assert there.lm_head.held is there.get_input_embeddings().held
    wanted = models.logits(here, ids)
    torch.testing.assert_close(models.logits(there, ids.cuda()).cpu(), wanted, rtol=1e-3, atol=1e-3)
    back = there.to("cpu")
    torch.testing.assert_close(models.logits(back, ids), wanted, rtol=1e-5, atol=1e-5)
    there.to("cuda").save_pretrained(tmp_path / "saved")
    before, after = GgufFile(path), GgufFile(tmp_path / "saved" / "model.gguf")
    assert all(torch.equal(after.get(name), before.get(name)) for name in before.entries)
