"""Architectures with experts whose heads differ between layers with full attention and those with a sliding window."""

from __future__ import annotations

from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.rows.experts import GLM4_MOE_ROW
from fewbit.models.gguf.rows.shared import (
    HEAD_NORMS,
    LLAMA,
    MODEL,
    NO_BIAS,
    QWEN_EXPERTS,
    SHARED_COUNTS,
    SHARED_EXPERTS,
    SIGMOID,
)

ROWS = (
    # Values have another width than keys
    Architecture(
        "mimo2",
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        MODEL,
        LLAMA | QWEN_EXPERTS,
        parameters={**GLM4_MOE_ROW.parameters, "self_attn.sinks": "attn_sinks.weight"},
        required={**NO_BIAS, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        rope_required={"rope_type": "default"},
        optional={"attention_value_scale": "attention.value_scale"},
        counts=GLM4_MOE_ROW.counts,
        integers={key: GLM4_MOE_ROW.integers[key] for key in ("n_group", "topk_group")},
        experts="n_routed_experts",
        mlp_types="mlp_layer_types",
        constants=SIGMOID,
        untied=True,
        value_width="v_head_dim",
        kv_in_windows=2,
        partial_rotary=True,
        turned_part=0.334,
        local_theta=10000.0,
        period=6,
        pattern=True,
        some_window=True,
    ),
    # Layers have other numbers of query heads
    Architecture(
        "laguna",
        "laguna",
        "LagunaForCausalLM",
        MODEL,
        {**LLAMA, **HEAD_NORMS, "self_attn.g_proj": "attn_gate", **QWEN_EXPERTS, **SHARED_EXPERTS},
        parameters=GLM4_MOE_ROW.parameters,
        required={**NO_BIAS, "moe_apply_router_weight_on_input": False, "moe_router_logit_softcapping": 0.0},
        numbers={"moe_routed_scaling_factor": ("expert_weights_scale", 1.0)},
        counts=SHARED_COUNTS,
        experts="num_experts",
        mlp_types="mlp_layer_types",
        constants={**SIGMOID, "expert_weights_norm": True},
        query_heads="num_attention_heads_per_layer",
        gates="gating",
        partial_rotary=True,
        turned_in_windows="rope.dimension_count_swa",
        other_ramp=True,
        local_theta=0.0,
        period=4,
        first_full=True,
        pattern=True,
    ),
)
