"""Packed models under `torch.compile`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fewbit
from fewbit.system import native

# A process of its own: Dynamo keeps what it has compiled and warned of.
COMPILED = """
import sys, warnings
import torch
from transformers import AutoModelForCausalLM
import fewbit
fewbit.prefer()
warnings.simplefilter("error")
folder, fused = sys.argv[1], sys.argv[2] == "fused"
place = {"pretrained_model_name_or_path": folder}
if folder.endswith(".gguf"):
    place = {"pretrained_model_name_or_path": folder.rpartition("/")[0], "gguf_file": folder.rpartition("/")[2]}
model = fewbit.load(folder, fuse=64) if fused else AutoModelForCausalLM.from_pretrained(**place)
assert "cpu" in {module.kernel.name for module in model.modules() if getattr(module, "kernel", None)}
ids = torch.tensor([[1, 5, 9, 4]], dtype=torch.int64)
with torch.no_grad():
    compiled = torch.compile(model, backend="eager")(input_ids=ids).logits
    wanted = model(input_ids=ids).logits
assert torch.equal(compiled, wanted) or (compiled - wanted).norm() <= 1e-2 * wanted.norm()
"""


@pytest.mark.skipif(isinstance(native.available(), str), reason="the library is missing")
@pytest.mark.parametrize(
    ("plan", "how"), [("rtn-4bit", "plain"), ("nf4", "plain"), ("q4_k_m", "plain"), ("rtn-4bit", "fused")]
)
def test_dynamo_has_nothing_to_warn_of(plan: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_ACTIVATIONS", raising=False)  # tests/conftest.py sets it
    out = tmp_path / ("out.gguf" if plan == "q4_k_m" else "out")
    fewbit.quantize("tiny", out, plan=plan)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(out), how], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lru_cache" not in done.stderr
