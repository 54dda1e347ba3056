"""Layers of several kinds in the metadata of GGUF files: what fewbit refuses, and a width that is adjusted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbit.api import generate
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.gguf import config, hybrid
from tests import architectures, gguf_files, models

YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
BASES = {"full_attention": 500000.0, "sliding_attention": 10000.0}


def file(**changes: Any) -> GgufFile:
    """A file of LFM2 without weights: its keys, and names and shapes of the tensors that are read."""
    keys = {
        "general.architecture": "lfm2",
        "lfm2.block_count": 3,
        "lfm2.context_length": 128,
        "lfm2.embedding_length": 64,
        "lfm2.feed_forward_length": 96,
        "lfm2.shortconv.l_cache": 3,
        "lfm2.attention.head_count": 4,
        "lfm2.attention.head_count_kv": np.array([0, 2, 0], np.int32),
        "lfm2.attention.layer_norm_rms_epsilon": 1e-5,
    } | {f"lfm2.attention.{key}": value for key, value in changes.items()}
    shapes = {"token_embd.weight": (288, 64), "blk.1.attn_q.weight": (64, 64)}
    shapes |= {f"blk.{layer}.ffn_up.weight": (96, 64) for layer in range(3)}
    entries = {
        name: SimpleNamespace(name=name, shape=shape, type="f32", spec=SimpleNamespace(nbytes=4))
        for name, shape in shapes.items()
    }
    return cast(GgufFile, SimpleNamespace(path="m.gguf", metadata=keys, entries=entries))


def small(kind: str, changes: dict[str, dict[str, Any]]) -> Any:
    """A small config of that type."""
    return architectures.small(CONFIG_MAPPING[kind], architectures.SIZES, changes)


def parts(full: float | None, sliding: float | None) -> dict[str, dict[str, Any]]:
    """RoPE of these parts of a head, in layers with full attention and with a sliding window. None: it does not say."""
    found: dict[str, dict[str, Any]] = {
        kind: {"rope_type": "default", "rope_theta": base} for kind, base in BASES.items()
    }
    for rope, part in zip(found.values(), (full, sliding), strict=True):
        rope |= {} if part is None else {"partial_rotary_factor": part}
    return found


def test_layers_without_key_value_heads_are_convolutions() -> None:
    found = config.to_config(file())
    assert found["layer_types"] == ["conv", "full_attention", "conv"]
    assert (found["num_key_value_heads"], found["conv_L_cache"], found["block_auto_adjust_ff_dim"]) == (2, 3, False)


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        (2, "no list of the key-value heads"),
        (np.array([0.0, 2.0, 0.0], np.float32), "no list of the key-value heads"),
        (np.array([0, 2], np.int32), "heads of 2 layers are given, not of 3"),
        (np.array([1, 2, 0], np.int32), r"\[1, 2\] key-value heads, where one number"),
        (np.array([0, -2, 0], np.int32), r"\[-2\] key-value heads, where one number"),
    ],
    ids=["one-number", "floats", "too-few", "two-numbers", "negative"],
)
def test_other_lists_of_heads_are_refused(heads: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        config.to_config(file(head_count_kv=heads))


@pytest.mark.parametrize(("multiplier", "width"), [(1.0, 4608), (1.3, 5888), (None, 4437)])
def test_the_width_of_an_adjusted_mlp(multiplier: float | None, width: int) -> None:
    sizes = SimpleNamespace(block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=multiplier, block_multiple_of=256)
    assert hybrid.adjusted(sizes, 6656) == width  # 2/3 of it, times the multiplier, up to a multiple of 256
    sizes.block_auto_adjust_ff_dim = False
    assert hybrid.adjusted(sizes, 6656) == 6656


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, "this model's end at layer 1"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval = 1"),
        ("lfm2", {"conv_bias": True}, "conv_bias = False"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 7.0"),
        ("gpt_oss", {"rope_parameters": {**YARN, "truncate": True}}, "means truncate = False"),
        ("qwen3", {"rope_parameters": {**YARN, "truncate": False}}, "means truncate = True"),
        ("afmoe", {"mup_enabled": False}, "mup_enabled = True"),
        ("afmoe", {"layer_types": ["full_attention"] + ["sliding_attention"] * 4}, "in all layers but one in 4"),
        (
            "mellum",
            {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in BASES.items()}},
            r"one base of RoPE; this model has \[10000\.0, 500000\.0\]",
        ),
        (
            "granite_swa",
            {"layer_rope_theta": [1e4, 5e5, 0, 0]},
            r"one base of RoPE; the layers of this model have \[10000\.0, 500000\.0\]",
        ),
        ("granite_swa", {"layer_rope_theta": [0, 0, 0, 0]}, "one base of RoPE; the layers of this model have no RoPE"),
        ("granite_swa", {"layer_types": ["full_attention"] * 4}, "a sliding window in some layers; this model has"),
        ("cohere2_moe", {"layer_types": ["full_attention"] * 5}, "a sliding window in some layers; this model has"),
        ("cohere2", {"layer_types": ["full_attention"] * 4}, "a sliding window in some layers; this model has"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "a sliding window in some layers; this model has"),
        ("minicpm3", {"scale_emb": 10}, "scale_emb = 12"),
        ("minicpm3", {"v_head_dim": 8}, "v_head_dim = 16; this model has q_lora_rank = 32 and v_head_dim = 8"),
        ("glm_moe_dsa", {"index_head_dim": 16}, "multiple of 64 columns; this model's index_head_dim is 16"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}, "combination_strategy = average"),
        ("youtu", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-06"),
        ("glm", {"head_dim": 32}, "heads as wide as the model; this model's have 32 columns"),
        ("gpt_bigcode", {"multi_query": False}, "multi_query = True"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse", "dense"]}, "layers with experts after all others"),
        ("mimo_v2_flash", {"routed_scaling_factor": 2.5}, r"routed_scaling_factor = 1\.0; this model has 2\.5"),
        ("mimo_v2_flash", {"layer_types": ["full_attention"] * 5}, "a sliding window in some layers; this model has"),
        ("mimo_v2_flash", {"rope_parameters": parts(0.5, 0.25)}, "RoPE of the same part of a head in layers"),
        ("mimo_v2_flash", {"rope_parameters": parts(0.5, None)}, "RoPE of the same part of a head in layers"),
        ("mimo_v2_flash", {"rope_parameters": parts(None, None)}, "an even number of columns; this model has 5"),
        ("laguna", {"moe_router_logit_softcapping": 30.0}, r"moe_router_logit_softcapping = 0\.0"),
        ("laguna", {"rope_parameters": parts(0.5, 0.1)}, "an even number of columns; this model has 1"),
        ("lfm2_moe", {"use_expert_bias": False}, "use_expert_bias = True"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(kind: str, changes: dict[str, Any], reason: str) -> None:
    made = {kind: gguf_files.TYPES.get(kind, {}) | changes}
    with pytest.raises(PlanError, match=reason):
        config.to_metadata(small(kind, made), "m")


def test_experts_per_token_that_differ_are_refused() -> None:
    sizes = {"hunyuan_v1_moe": {"num_experts_per_tok": [1, 2]}}
    with pytest.raises(PlanError, match=r"one value for moe_topk; the layers of this model have \[1, 2\]"):
        config.to_metadata(small("hunyuan_v1_moe", sizes), "m")


def test_an_alpha_of_rope_becomes_a_larger_base(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
    folder = gguf_files.save(tmp_path / "m", "hunyuan_v1_dense", rope_parameters=rope)
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    assert GgufFile(path).metadata["hunyuan-dense.rope.freq_base"] == pytest.approx(1e4 * 50 ** (16 / 14))
    ids = gguf_files.ids()
    found, wanted = (
        models.logits(model, ids) for model in (generate.load(path, dtype=torch.float32), models.original(folder))
    )
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_a_ramp_of_yarn_that_is_not_rounded_is_kept(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "gpt_oss", rope_parameters={**YARN, "truncate": False})
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    ids = gguf_files.ids()
    found = models.logits(generate.load(path, dtype=torch.float32), ids)
    wanted = models.logits(models.original(folder), ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
