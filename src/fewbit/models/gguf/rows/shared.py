"""Names of tensors and entries of configs that several rows share."""

from __future__ import annotations

from collections.abc import Mapping

MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
LLAMA = {**ATTENTION, "post_attention_layernorm": "ffn_norm", **MLP}
LATENT = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
HUNYUAN_NORMS = {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
ROPE = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

BIAS = {"attention_bias": "blk.0.attn_q.bias"}
NO_BIAS = {"attention_bias": False}
GELU = "gelu_pytorch_tanh"
SQUARE = {"head_dim": ""}  # a head is as wide as the model divided by the heads
LAYER_NORM = {"rms_norm_eps": "layer_norm_eps"}
MEAN_EPSILON = "attention.layer_norm_epsilon"  # of norms that subtract the mean
GRANITE: Mapping[str, tuple[str, float | None]] = {
    "attention_multiplier": ("attention.scale", None),
    "embedding_multiplier": ("embedding_scale", 1.0),
    "residual_multiplier": ("residual_scale", 1.0),
    "logits_scaling": ("logit_scale", None),
}

# Experts
QWEN_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
MIXTRAL_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.w1": "ffn_gate_exps",
    "mlp.experts.*.w3": "ffn_up_exps",
    "mlp.experts.*.w2": "ffn_down_exps",
}
NO_MLP = {name: ours for name, ours in LLAMA.items() if not name.startswith("mlp.")}
EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
LOCAL_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
# The layer's own experts and those that every token uses, as DeepSeek names them
SHARED_EXPERTS = {
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
SIGMOID = {"expert_gating_func": 2}
SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
SHARED_COUNTS = {
    **EXPERTS,
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
