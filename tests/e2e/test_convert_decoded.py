"""`convert` names the quantized weights of a source that fewbit can only decode."""

from __future__ import annotations

from pathlib import Path

import pytest

import fewbit
from fewbit.errors import PlanError
from fewbit.plans.plan import Plan, Rule
from tests import gguf_files, models

# The file has the value heads, 64 columns each, in another order than the model.
HEADS = {"linear_value_head_dim": 64, "linear_num_value_heads": 4, "linear_key_head_dim": 64}
SIZES = {**HEADS, "linear_num_key_heads": 2, "hidden_size": 256, "intermediate_size": 256}


@pytest.mark.filterwarnings("default")  # the model warns that it has no kernels of its own
def test_blocks_that_have_columns_of_two_heads_are_refused(tmp_path: Path) -> None:
    model, file = gguf_files.save(tmp_path / "model", "qwen3_5_text", **SIZES), tmp_path / "model.gguf"
    rules = [Rule("*.linear_attn.out_proj", "q4_k"), Rule("*", "q4_0")]
    fewbit.quantize(model, file, plan=Plan("mixed", "gguf", tuple(rules)), progress=False)
    with pytest.raises(PlanError, match=r"reads the quantized weights of model\.layers\.0-2\.linear_attn\.out_proj as"):
        fewbit.convert(file, tmp_path / "out", to="gptq", progress=False)
    assert not (tmp_path / "out").exists()
    fewbit.convert(file, tmp_path / "dense", to="dense", progress=False)
    name = "model.layers.0.linear_attn.out_proj.weight"
    decoded, original = (models.tensors_of(folder)[name] for folder in (tmp_path / "dense", model))
    assert 0 < (decoded - original).norm() < 0.1 * original.norm()
    rules[0] = Rule("*.linear_attn.out_proj", "q4_0")  # blocks of 32 columns
    fewbit.quantize(model, file, plan=Plan("alike", "gguf", tuple(rules)), progress=False, overwrite=True)
    assert fewbit.convert(file, tmp_path / "out", to="gptq", progress=False).schemes == {"int4-g32-sym": 25}
