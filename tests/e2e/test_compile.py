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


# A model with experts, saved.
EXPERTS = """
import sys, torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
sizes = {"vocab_size": 64, "hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32}
config = Qwen3MoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""

# As transformers' guide to static caches does it. The blocks that the library computes are known by then.
GENERATED = """
import sys, warnings
import torch
import fewbit
from fewbit.models.decoding import compiled_blocks
warnings.simplefilter("error")
model = fewbit.load(sys.argv[1])
ids = torch.tensor([[1, 5, 9, 4]], dtype=torch.int64)
given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
wanted = model.generate(ids, **given)
assert compiled_blocks.computed(model)
model.forward = torch.compile(model.forward, backend="eager")
assert torch.equal(model.generate(ids, **given), wanted)
"""


@pytest.mark.skipif(isinstance(native.available(), str), reason="the library is missing")
@pytest.mark.parametrize(
    ("plan", "how"),
    [("rtn-4bit", "plain"), ("nf4", "plain"), ("q4_k_m", "plain"), ("rtn-4bit", "fused"), ("nf4", "experts")],
)
def test_dynamo_has_nothing_to_warn_of(plan: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_ACTIVATIONS", raising=False)  # tests/conftest.py sets it
    out = tmp_path / ("out.gguf" if plan == "q4_k_m" else "out")
    model = "tiny"
    if how == "experts":
        model = str(tmp_path / "model")
        subprocess.run([sys.executable, "-c", EXPERTS, model], check=True)
    fewbit.quantize(model, out, plan=plan)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(out), how], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lru_cache" not in done.stderr


@pytest.mark.skipif(isinstance(native.available(), str), reason="the library is missing")
def test_dynamo_compiles_a_models_own_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes them in eager calls cannot be traced."""
    monkeypatch.delenv("FEWBIT_ACTIVATIONS", raising=False)  # tests/conftest.py sets it
    fewbit.quantize("tiny", tmp_path / "out", plan="rtn-4bit")
    done = subprocess.run(
        [sys.executable, "-c", GENERATED, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
