"""Positions in the metadata of GGUF files: scalings of RoPE that llama.cpp computes otherwise are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbit.api import generate
from fewbit.errors import PlanError
from fewbit.models.gguf.config import to_metadata
from tests import architectures, gguf_files, models

YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MINISTRAL3 = gguf_files.TYPES["ministral3"]["rope_parameters"]


def keys(kind: str, **rope: Any) -> dict[str, Any]:
    special = {kind: {**gguf_files.TYPES.get(kind, {}), "rope_parameters": rope}}
    return to_metadata(architectures.small(CONFIG_MAPPING[kind], architectures.SIZES, special), "m")


@pytest.mark.parametrize(
    ("kind", "rope", "reason"),
    [
        ("qwen2", {**YARN, "beta_fast": 24.0}, r"beta_fast = 32\.0 in its YaRN scaling; this model has 24\.0"),
        (
            "qwen2",
            {**YARN, "attention_factor": 1.5},
            "attention_factor = 1.13863 in its YaRN scaling; this model has 1.5",
        ),
        ("qwen2", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, "attention_factor = 1.13863"),
        ("cohere2", YARN, "runs cohere2 without rope scaling of type 'yarn'"),
        ("olmo2", LLAMA3, "runs olmo2 without rope scaling of type 'llama3'"),
        ("ministral3", {**MINISTRAL3, "attention_factor": 1.5}, "attention_factor"),
        ("ministral3", {**MINISTRAL3, "mscale": 0.5}, r"mscale = 1\.0 in rope_parameters; this model has 0\.5"),
        ("ministral3", {**MINISTRAL3, "rope_type": "default"}, "rope_type = yarn"),
    ],
)
def test_other_scalings_of_rope_are_refused(kind: str, rope: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        keys(kind, **rope)


def test_the_usual_numbers_of_yarn_are_written() -> None:
    found = keys("qwen2", **YARN, beta_fast=32, beta_slow=1.0, attention_factor=1.138629436)
    assert found["qwen2.rope.scaling.yarn_attn_factor"] == 1.138629436
    assert (found["qwen2.rope.scaling.yarn_beta_fast"], found["qwen2.rope.scaling.yarn_beta_slow"]) == (32, 1)
    assert keys("ministral3", **MINISTRAL3)["mistral3.rope.scaling.yarn_beta_fast"] == 24


def test_a_file_of_mistral_3_may_have_a_mistral(tmp_path: Path) -> None:
    """Its text model, if queries are not scaled by their position."""
    folder = gguf_files.save(tmp_path / "m", "mistral", sliding_window=None)
    file = gguf_files.renamed(gguf_files.written(folder, tmp_path / "m.gguf"), tmp_path / "other.gguf", "mistral3")
    loaded, ids = generate.load(file, dtype=torch.float32), gguf_files.ids()
    assert isinstance(loaded, MistralForCausalLM)
    assert torch.equal(models.logits(loaded, ids), models.logits(models.original(folder), ids))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("phimoe", r"in llama\.cpp its norms do not subtract the mean"),
        ("bamba", r"in llama\.cpp RoPE turns other columns"),
        ("bitnet", r"llama\.cpp has silu in its MLP"),
        ("dbrx", r"llama\.cpp has the RoPE base of `attn_config\.rope_theta`"),
        ("dots3_note_text", r"in llama\.cpp RoPE turns other columns of its indexers"),
        ("qwen4_exp_text", "in texts longer than `indexer_budget`"),
        ("hy_v4", r"in llama\.cpp RoPE turns other columns of a head"),
    ],
)
def test_a_type_that_llama_cpp_computes_otherwise_is_refused(kind: str, why: str) -> None:
    with pytest.raises(PlanError, match=f"a model of type '{kind}': {why}"):
        to_metadata(CONFIG_MAPPING[kind](), "m")
