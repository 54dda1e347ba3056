"""Gemma's later architectures, whose layers have inputs of their own."""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.gguf.architecture import Architecture, Cut, Piece
from fewbit.models.gguf.rows.dense import GEMMA2
from fewbit.models.gguf.rows.shared import GELU, HEAD_NORMS, MODEL, NO_BIAS, ROPE

# An embedding and a projection of it give each layer an input of its own
_LAYER_INPUTS = {
    **MODEL,
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}
_LAYER_INPUT = {
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
GEMMA4_ROW = Architecture(
    "gemma4",
    "gemma4_text",
    "Gemma4ForCausalLM",
    _LAYER_INPUTS,
    {**GEMMA2, **HEAD_NORMS, **_LAYER_INPUT},
    parameters={"layer_scalar": "layer_output_scale.weight"},
    extra=ROPE,
    without_lora=frozenset(("per_layer_model_proj",)),
    activation=GELU,
    chosen={"enable_moe_block": False},
    fixed={"enable_moe_block": False},
    required=NO_BIAS,
    integers={
        "hidden_size_per_layer_input": ("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": ("attention.shared_kv_layers", 0),
    },
    tied=True,
    two_kinds=True,
    local_theta=10000.0,
    period=6,
)
_HALF = ("num_experts", "moe_intermediate_size")
# Each layer has an MLP and experts
GEMMA4_EXPERTS_ROW = replace(
    GEMMA4_ROW,
    block={
        **GEMMA4_ROW.block,
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "router.proj": "ffn_gate_inp",
        "experts.*.gate_proj": "ffn_gate_up_exps",
        "experts.*.up_proj": "ffn_gate_up_exps",
        "experts.*.down_proj": "ffn_down_exps",
    },
    parameters={
        **GEMMA4_ROW.parameters,
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
    },
    cut={"ffn_gate_up_exps": Cut("num_experts", (Piece("ffn_gate_up_exps", (_HALF, _HALF), by_head=True),), 2)},
    chosen={"enable_moe_block": True},
    fixed={"enable_moe_block": True},
    counts={
        "num_experts": "expert_count",
        "top_k_experts": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    },
    experts="num_experts",
    when=("expert_count",),
)
# The language model of Gemma 4 without inputs of single layers and experts. Its files are read as Gemma 4's
GEMMA4_UNIFIED_ROW = replace(
    GEMMA4_ROW,
    model_type="gemma4_unified_text",
    cls="Gemma4UnifiedForCausalLM",
    model=MODEL,
    block={**GEMMA2, **HEAD_NORMS},
    without_lora=frozenset(),
    chosen={},
    fixed={},
    integers={"num_kv_shared_layers": ("attention.shared_kv_layers", 0)},
    constants={"embedding_length_per_layer_input": 0},
)
# llama.cpp has no keys for its sizes, so they are those of the published models
GEMMA3N_ROW = Architecture(
    "gemma3n",
    "gemma3n_text",
    "Gemma3nForCausalLM",
    {
        **_LAYER_INPUTS,
        **{f"model.altup_projections.{i}": "altup_proj" for i in range(3)},
        **{f"model.altup_unembed_projections.{i}": "altup_unembd_proj" for i in range(3)},
    },
    {
        **GEMMA2,
        **HEAD_NORMS,
        **_LAYER_INPUT,
        "altup.correction_coefs": "altup_correct_coef",
        "altup.prediction_coefs": "altup_predict_coef",
        "altup.modality_router": "altup_router",
        "altup.router_norm": "altup_router_norm",
        "laurel.linear_left": "laurel_l",
        "laurel.linear_right": "laurel_r",
        "laurel.post_laurel_norm": "laurel_post_norm",
    },
    parameters={"altup.correct_output_scale": "altup_correct_scale.weight"},
    without_lora=frozenset(("per_layer_model_proj", "altup_proj", "altup_unembd_proj", "altup_router")),
    padded={"per_layer_token_embd": "vocab_size_per_layer_input"},
    activation=GELU,
    required={
        **NO_BIAS,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "hidden_size_per_layer_input": 256,
        "final_logit_softcapping": 30.0,
    },
    constants={
        "altup.active_idx": 0,
        "altup.num_inputs": 4,
        "embedding_length_per_layer_input": 256,
    },
    tied=True,
    unshared=20,
    sparse=10,
    local_theta=10000.0,
    period=5,
    differs=(
        "llama.cpp divides by one less in the deviation of the gates of the first 10 layers, so its logits differ; "
        "tokens of images and sound get zeros from the file's embedding of single layers, and row 0 in the original"
    ),
)

ROWS = (GEMMA3N_ROW, GEMMA4_EXPERTS_ROW, GEMMA4_ROW, GEMMA4_UNIFIED_ROW)
