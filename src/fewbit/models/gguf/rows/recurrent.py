"""Architectures with layers that keep a state in place of keys and values."""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.rows.shared import (
    ATTENTION,
    HEAD_NORMS,
    MLP,
    MODEL,
    NO_BIAS,
    QWEN_EXPERTS,
    SHARED_COUNTS,
    SHARED_EXPERT,
)

# Layers with linear attention, and others whose queries have a gate
DELTA = {
    **ATTENTION,
    **HEAD_NORMS,
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
QWEN35_ROW = Architecture(
    "qwen35",
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    MODEL,
    {**DELTA, **MLP},
    parameters={"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
    shift=1.0,
    unshifted=frozenset({"ssm_norm"}),
    negative_exp=frozenset({"ssm_a"}),
    squeezed=frozenset({"ssm_conv1d"}),
    tiled=True,
    required=NO_BIAS,
    gated_queries=True,
    linear_attention=True,
    partial_rotary=True,
    sections=True,
)


ROWS = (
    QWEN35_ROW,
    replace(
        QWEN35_ROW,
        name="qwen35moe",
        model_type="qwen3_5_moe_text",
        cls="Qwen3_5MoeForCausalLM",
        block={**DELTA, **QWEN_EXPERTS, **SHARED_EXPERT},
        keys={"intermediate_size": ""},
        counts=SHARED_COUNTS,
        experts="num_experts",
    ),
)
