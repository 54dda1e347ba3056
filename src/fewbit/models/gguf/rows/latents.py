"""Architectures whose keys and values are expanded from a latent (MLA), as DeepSeek's."""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.gguf.architecture import Architecture, Cut, Piece
from fewbit.models.gguf.rows.experts import GLM4_MOE_ROW
from fewbit.models.gguf.rows.shared import (
    LATENT,
    MIXTRAL_EXPERTS,
    MLP,
    MODEL,
    NO_BIAS,
    NO_MLP,
    QWEN_EXPERTS,
    SHARED_EXPERTS,
    SIGMOID,
)

# Keys and values are expanded from a latent
DEEPSEEK_ROW = Architecture(
    "deepseek2",
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    MODEL,
    {
        **{name: ours for name, ours in NO_MLP.items() if "k_proj" not in name and "v_proj" not in name},
        **LATENT,
        "self_attn.kv_b_proj": "attn_kv_b",
        **MLP,
        **QWEN_EXPERTS,
        **SHARED_EXPERTS,
    },
    cut={
        "attn_kv_b": Cut(
            "num_attention_heads",
            (
                Piece("attn_k_b", (("num_attention_heads", "qk_nope_head_dim"),), by_head=True, transposed=True),
                Piece("attn_v_b", (("num_attention_heads", "v_head_dim"),), by_head=True),
            ),
        )
    },
    without_lora=frozenset(("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "output")),
    # transformers has 1e-6 in the norms of latents, whatever config.json says
    required={**NO_BIAS, "mlp_bias": False, "topk_method": "greedy", "norm_topk_prob": False, "rms_norm_eps": 1e-6},
    numbers={"routed_scaling_factor": ("expert_weights_scale", 1.0)},
    counts=GLM4_MOE_ROW.counts,
    integers={
        "n_shared_experts": ("expert_shared_count", 0),
        "first_k_dense_replace": ("leading_dense_block_count", 0),
    },
    constants={"expert_group_count": 1, "expert_group_used_count": 1, "expert_gating_func": 1},
    experts="n_routed_experts",
    latent=True,
    lite=True,
    grouped=False,
    when=("expert_count",),
)
DEEPSEEK_V3_ROW = replace(
    DEEPSEEK_ROW,
    model_type="deepseek_v3",
    cls="DeepseekV3ForCausalLM",
    parameters=GLM4_MOE_ROW.parameters,
    required={**NO_BIAS, "rope_interleave": True, "norm_topk_prob": True, "rms_norm_eps": 1e-6},
    integers=GLM4_MOE_ROW.integers,
    constants={**SIGMOID, "expert_weights_norm": True},
    when=("expert_weights_norm",),
)
# GLM 4.7 Flash. Its files are read as DeepSeek's
GLM4_LITE_ROW = replace(
    DEEPSEEK_V3_ROW,
    model_type="glm4_moe_lite",
    cls="Glm4MoeLiteForCausalLM",
    required={**NO_BIAS, "rope_interleave": True, "norm_topk_prob": True},
    integers={key: ours for key, ours in DEEPSEEK_V3_ROW.integers.items() if key != "first_k_dense_replace"},
    mlp_types="mlp_layer_types",
    differs="transformers has 1e-6 in the norms of latents, llama.cpp `rms_norm_eps`, so its logits may differ",
)
# Each token attends to the tokens that an indexer chooses
_INDEXER = {
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
}
DEEPSEEK_V32_ROW = replace(
    DEEPSEEK_V3_ROW,
    name="deepseek32",
    model_type="deepseek_v32",
    cls="DeepseekV32ForCausalLM",
    block={**DEEPSEEK_ROW.block, **_INDEXER},
    without_lora=DEEPSEEK_ROW.without_lora.union(_INDEXER.values()),
    counts={
        **GLM4_MOE_ROW.counts,
        "index_n_heads": "attention.indexer.head_count",
        "index_head_dim": "attention.indexer.key_length",
        "index_topk": "attention.indexer.top_k",
    },
    required={**NO_BIAS, "norm_topk_prob": True, "rms_norm_eps": 1e-6},
    integers={key: ours for key, ours in GLM4_MOE_ROW.integers.items() if key != "first_k_dense_replace"},
    mlp_types="mlp_layer_types",
    lite=False,
    when=(),
)
GLM_DSA_ROW = replace(
    DEEPSEEK_V32_ROW,
    name="glm-dsa",
    model_type="glm_moe_dsa",
    cls="GlmMoeDsaForCausalLM",
    required={**NO_BIAS, "norm_topk_prob": True},
    rope_required={"rope_type": "default"},  # llama.cpp does not read yarn_log_multiplier
    listed={"indexer_types": ("attention.indexer.types", "full", "shared")},
    differs=GLM4_LITE_ROW.differs,
)
# A DeepSeek without experts
YOUTU_ROW = replace(
    DEEPSEEK_V3_ROW,
    model_type="youtu",
    cls="YoutuForCausalLM",
    block={name: ours for name, ours in DEEPSEEK_ROW.block.items() if "exp" not in ours and ours != "ffn_gate_inp"},
    parameters={},
    required={**NO_BIAS, "rope_interleave": True, "rms_norm_eps": 1e-6},
    numbers={},
    counts={"num_hidden_layers": "leading_dense_block_count"},
    products={"expert_feed_forward_length": ("intermediate_size",)},
    integers={},
    constants={"expert_shared_count": 0},
    experts="",
    differs="transformers loads 0 as the embedding of the padding token, llama.cpp the file's, so its logit differs",
    when=(),
)

# Linear attention with a decay for each column (KDA) in some layers, and latents without positions in the others
_KDA = ("linear_num_heads", "linear_head_dim")
_DELTA = {
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.forget_gate.f_a_proj": "ssm_f_a",
    "self_attn.forget_gate.f_b_proj": "ssm_f_b",
    "self_attn.b_proj": "ssm_beta",
    "self_attn.g_a_proj": "ssm_g_a",
    "self_attn.g_b_proj": "ssm_g_b",
}
KIMI_LINEAR_ROW = replace(
    DEEPSEEK_V3_ROW,
    name="kimi-linear",
    model_type="kimi_linear",
    cls="KimiLinearForCausalLM",
    block={
        **{name: ours for name, ours in DEEPSEEK_ROW.block.items() if name not in QWEN_EXPERTS},
        **MIXTRAL_EXPERTS,
        **_DELTA,
        "self_attn.conv1d": "ssm_conv1d",
        "self_attn.o_norm": "ssm_norm",
    },
    parameters={
        **GLM4_MOE_ROW.parameters,
        "self_attn.forget_gate.A_log": "ssm_a",
        "self_attn.forget_gate.dt_bias": "ssm_dt.bias",
    },
    cut={
        **DEEPSEEK_ROW.cut,
        "ssm_conv1d": Cut("", tuple(Piece(f"ssm_conv1d_{each}", (_KDA,), convolution=True) for each in "qkv")),
    },
    squeezed=frozenset({"ssm_conv1d"}),
    led=frozenset({"ssm_a"}),
    negative_exp=frozenset({"ssm_a"}),
    without_lora=DEEPSEEK_ROW.without_lora.union(_DELTA.values(), ("attn_output",)),  # in layers with KDA
    required={**NO_BIAS, "q_lora_rank": None, "norm_topk_prob": True},
    equal={"linear_num_heads": "num_attention_heads"},
    counts={
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "linear_head_dim": "kda.head_dim",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
    },
    integers={key: ours for key, ours in GLM4_MOE_ROW.integers.items() if key != "first_k_dense_replace"},
    constants=SIGMOID,
    experts="num_local_experts",
    mlp_types="mlp_layer_types",
    without_attention="linear_attention",
    no_positions=True,
    untied=True,
    lite=False,
    differs="transformers has 1e-6 in the norms of latents and of linear attention's queries and keys, llama.cpp "
    "`rms_norm_eps`, so its logits may differ",
    when=(),
)

ROWS = (
    KIMI_LINEAR_ROW,
    DEEPSEEK_V3_ROW,
    GLM4_LITE_ROW,
    DEEPSEEK_ROW,
    replace(DEEPSEEK_V3_ROW, model_type="sarvam_mla"),  # its files are read as DeepSeek's
    DEEPSEEK_V32_ROW,
    GLM_DSA_ROW,
    YOUTU_ROW,
)
