"""Architectures with layers that keep a state in place of keys and values, or with blocks that run several times."""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.gguf.architecture import Architecture, Cut, Piece
from fewbit.models.gguf.rows.shared import (
    ALL_SPARSE,
    ATTENTION,
    EXPERTS,
    HEAD_NORMS,
    MLP,
    MODEL,
    NO_BIAS,
    QWEN_EXPERTS,
    SHARED_COUNTS,
    SHARED_EXPERT,
    SIGMOID,
    SQUARE,
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

# The same with two projections in place of four. llama.cpp cuts the larger one
QWEN3_NEXT_ROW = replace(
    QWEN35_ROW,
    name="qwen3next",
    model_type="qwen3_next",
    cls="Qwen3NextForCausalLM",
    block={
        **{name: ours for name, ours in DELTA.items() if not name.startswith("linear_attn.in_proj")},
        "linear_attn.in_proj_qkvz": "ssm_in",
        "linear_attn.in_proj_ba": "ssm_ba",
        **QWEN_EXPERTS,
        **SHARED_EXPERT,
    },
    cut={
        "ssm_in": Cut(
            "linear_num_key_heads",
            (
                Piece(
                    "attn_qkv",
                    (
                        ("linear_num_key_heads", "linear_key_head_dim"),
                        ("linear_num_key_heads", "linear_key_head_dim"),
                        ("linear_num_value_heads", "linear_value_head_dim"),
                    ),
                ),
                Piece("attn_gate", (("linear_num_value_heads", "linear_value_head_dim"),)),
            ),
        )
    },
    tiled=False,
    sections=False,
    required={**NO_BIAS, **ALL_SPARSE, "norm_topk_prob": True},
    counts=SHARED_COUNTS,
    experts="num_experts",
)

# Layers with a short convolution, and others with attention
LFM2 = {
    "operator_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
LFM2_ROW = Architecture(
    "lfm2",
    "lfm2",
    "Lfm2ForCausalLM",
    {"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output"},
    LFM2,
    squeezed=frozenset({"shortconv.conv"}),
    activation="",
    keys={**SQUARE, "rms_norm_eps": "norm_eps"},
    fixed={"block_auto_adjust_ff_dim": False},
    required={"conv_bias": False},
    counts={"conv_L_cache": "shortconv.l_cache"},
    without_attention="conv",
)

# Two lists of blocks that run several times, with norms without weights
HRM_ROW = Architecture(
    "hrm_text",
    "hrm_text",
    "HrmTextForCausalLM",
    {"model.embed_tokens": "token_embd", "lm_head": "output"},
    {
        **{name: ours for name, ours in ATTENTION.items() if "norm" not in name},
        "self_attn.gate_proj": "attn_gate",
        **MLP,
    },
    outside={"model.z_L_init": "hrm.z_l_init"},
    layers=("model.L_module.layers", "model.H_module.layers"),
    cycles=("num_layers_per_stack", "H_cycles", "L_cycles"),
    keys={"num_key_value_heads": ""},
    required={**NO_BIAS, "mlp_bias": False},
    numbers={"embedding_scale": ("embedding_scale", 1.0)},
    counts={
        "num_layers_per_stack": "hrm.layers_per_stack",
        "H_cycles": "hrm.h_cycles",
        "L_cycles": "hrm.l_cycles",
    },
    flags={"prefix_lm": "hrm.prefix_lm"},
    differs="llama.cpp attends causally to a prompt, too, where transformers is given token types of a prefix",
)

ROWS = (
    HRM_ROW,
    LFM2_ROW,
    replace(
        LFM2_ROW,
        name="lfm2moe",
        model_type="lfm2_moe",
        cls="Lfm2MoeForCausalLM",
        block={
            **LFM2,
            "feed_forward.gate": "ffn_gate_inp",
            "feed_forward.experts.*.w1": "ffn_gate_exps",
            "feed_forward.experts.*.w3": "ffn_up_exps",
            "feed_forward.experts.*.w2": "ffn_down_exps",
        },
        parameters={"feed_forward.expert_bias": "exp_probs_b.bias"},
        fixed={},
        required={"conv_bias": False, "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        counts={
            **EXPERTS,
            "conv_L_cache": "shortconv.l_cache",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        integers={"num_dense_layers": ("leading_dense_block_count", 0)},
        experts="num_experts",
        constants=SIGMOID,
    ),
    QWEN35_ROW,
    QWEN3_NEXT_ROW,
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
