"""Every architecture of llama.cpp that fewbit reads and writes, one row for each. CONTRIBUTING.md says how to add one.

Code reads the fields of a row, and never compares its name. A type of transformers whose mathematics llama.cpp does not
have is refused: `required` and its neighbours say what llama.cpp takes for granted.

Source: gguf-py's name tables, and conversion/ and src/models/ of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fewbit.models.gguf.architecture import Architecture

_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LLAMA = {**_ATTENTION, "post_attention_layernorm": "ffn_norm", **_MLP}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA2 = {
    **_ATTENTION,
    **_MLP,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Norms after attention and MLP only
_NORMS_AFTER = {
    **{name: ours for name, ours in _ATTENTION.items() if "norm" not in name},
    **_MLP,
    **_HEAD_NORMS,
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ROPE = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_NO_BIAS = {"attention_bias": False}
_GELU = "gelu_pytorch_tanh"
_SQUARE = {"head_dim": ""}  # a head is as wide as the model divided by the heads
_LAYER_NORM = {"rms_norm_eps": "layer_norm_eps"}
_MEAN_EPSILON = "attention.layer_norm_epsilon"  # of norms that subtract the mean

_LLAMA_ROW = Architecture(
    "llama",
    "llama",
    "LlamaForCausalLM",
    _MODEL,
    _LLAMA,
    extra=_ROPE,
    permuted=True,
    biases={**_BIAS, "mlp_bias": "blk.0.ffn_down.bias"},
)
_GRANITE: Mapping[str, tuple[str, float | None]] = {
    "attention_multiplier": ("attention.scale", None),
    "embedding_multiplier": ("embedding_scale", 1.0),
    "residual_multiplier": ("residual_scale", 1.0),
    "logits_scaling": ("logit_scale", None),
}
_COHERE = {name: ours for name, ours in _LLAMA.items() if ours != "ffn_norm"}  # attention and MLP share a norm
_GEMMA2_ROW = Architecture(
    "gemma2",
    "gemma2",
    "Gemma2ForCausalLM",
    _MODEL,
    _GEMMA2,
    shift=1.0,
    activation=_GELU,
    tied=True,
    period=2,
    default_window=True,
    scaled_by_hidden=46,
)
_OLMO2_ROW = Architecture(
    "olmo2",
    "olmo2",
    "Olmo2ForCausalLM",
    _MODEL,
    _NORMS_AFTER,
    keys=_SQUARE,
    required=_NO_BIAS,
    untied=True,
)

_QWEN_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
_NO_MLP = {name: ours for name, ours in _LLAMA.items() if not name.startswith("mlp.")}
_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_LOCAL_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}

# Layers with linear attention, and others whose queries have a gate
_DELTA = {
    **_ATTENTION,
    **_HEAD_NORMS,
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
_SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_SHARED_COUNTS = {
    **_EXPERTS,
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_QWEN35_ROW = Architecture(
    "qwen35",
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _MODEL,
    {**_DELTA, **_MLP},
    parameters={"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
    shift=1.0,
    unshifted=frozenset({"ssm_norm"}),
    negative_exp=frozenset({"ssm_a"}),
    squeezed=frozenset({"ssm_conv1d"}),
    tiled=True,
    required=_NO_BIAS,
    gated_queries=True,
    linear_attention=True,
    partial_rotary=True,
    sections=True,
)

_ROWS = (
    _LLAMA_ROW,
    replace(_LLAMA_ROW, model_type="mistral", cls="MistralForCausalLM", window=True, when="attention.sliding_window"),
    replace(
        _LLAMA_ROW,
        model_type="mixtral",
        cls="MixtralForCausalLM",
        block={
            **_NO_MLP,
            "mlp.gate": "ffn_gate_inp",
            "mlp.experts.*.w1": "ffn_gate_exps",
            "mlp.experts.*.w3": "ffn_up_exps",
            "mlp.experts.*.w2": "ffn_down_exps",
        },
        biases={},
        counts=_LOCAL_EXPERTS,
        experts="num_local_experts",
        window=True,
        when="expert_count",
    ),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _MODEL, _LLAMA, extra=_ROPE),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", _MODEL, _LLAMA | _HEAD_NORMS, extra=_ROPE, biases=_BIAS),
    _GEMMA2_ROW,
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        _MODEL,
        _GEMMA2 | _HEAD_NORMS,
        shift=1.0,
        activation=_GELU,
        local_theta=10000.0,
        period=6,
        scaled_by_hidden=62,
    ),
    Architecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        _MODEL,
        {
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        extra=_ROPE,
        partial_rotary=True,
        original_context=True,
        window=True,
        no_window=True,
    ),
    Architecture(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        {
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        {
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        layers="transformer.h",
        transposed=True,
        activation="gelu_new",
        keys={
            "num_hidden_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        fixed={"activation_function": "gelu_new"},
        epsilon=_MEAN_EPSILON,
    ),
    replace(
        _LLAMA_ROW,
        name="granite",
        model_type="granite",
        cls="GraniteForCausalLM",
        numbers=_GRANITE,
    ),
    replace(
        _LLAMA_ROW,
        name="granitemoe",
        model_type="granitemoe",
        cls="GraniteMoeForCausalLM",
        block={
            **_NO_MLP,
            "block_sparse_moe.router": "ffn_gate_inp",
            "block_sparse_moe.experts.*.gate_proj": "ffn_gate_exps",
            "block_sparse_moe.experts.*.up_proj": "ffn_up_exps",
            "block_sparse_moe.experts.*.down_proj": "ffn_down_exps",
        },
        biases=_BIAS,
        numbers=_GRANITE,
        counts=_LOCAL_EXPERTS,
        experts="num_local_experts",
    ),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _MODEL,
        {
            **_NO_MLP,
            **_QWEN_EXPERTS,
            **_SHARED_EXPERT,
        },
        keys=_SQUARE,
        required={**_ALL_SPARSE, "norm_topk_prob": False},
        counts=_SHARED_COUNTS,
        experts="num_experts",
        biases={"qkv_bias": "blk.0.attn_q.bias"},
        untied=True,
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _MODEL,
        _NO_MLP | _HEAD_NORMS | _QWEN_EXPERTS,
        required={**_ALL_SPARSE, "norm_topk_prob": True},
        counts={**_EXPERTS, "moe_intermediate_size": "expert_feed_forward_length"},
        experts="num_experts",
        biases=_BIAS,
    ),
    Architecture(
        "olmoe",
        "olmoe",
        "OlmoeForCausalLM",
        _MODEL,
        _NO_MLP | _HEAD_NORMS | _QWEN_EXPERTS,
        keys=_SQUARE,
        required={**_NO_BIAS, "norm_topk_prob": False, "clip_qkv": None},
        counts=_EXPERTS,
        experts="num_experts",
        untied=True,
        grouped=False,
    ),
    _OLMO2_ROW,
    replace(
        _OLMO2_ROW,
        model_type="olmo3",
        cls="Olmo3ForCausalLM",
        local_theta=0.0,
        period=4,
        when="attention.sliding_window",
    ),
    Architecture(
        "smollm3",
        "smollm3",
        "SmolLM3ForCausalLM",
        _MODEL,
        _LLAMA,
        permuted=True,
        fixed={"no_rope_layer_interval": 4},
        required={**_NO_BIAS, "mlp_bias": False, "use_sliding_window": False},
        unrotated=4,
    ),
    Architecture(
        "stablelm",
        "stablelm",
        "StableLmForCausalLM",
        _MODEL,
        _LLAMA,
        keys=_SQUARE | _LAYER_NORM,
        required={"qk_layernorm": False},
        flags={"use_parallel_residual": "use_parallel_residual"},
        epsilon=_MEAN_EPSILON,
        biases={"use_qkv_bias": "blk.0.attn_q.bias"},
        untied=True,
        partial_rotary=True,
    ),
    Architecture(
        "glm4",
        "glm4",
        "Glm4ForCausalLM",
        _MODEL,
        {
            **_ATTENTION,
            "post_self_attn_layernorm": "post_attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "post_mlp_layernorm": "post_ffw_norm",
        },
        biases=_BIAS,
        partial_rotary=True,
    ),
    Architecture(
        "gptneox",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "lm_head": "output",
        },
        {
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        layers="gpt_neox.layers",
        mixed=True,
        activation="gelu",
        keys={**_SQUARE, **_LAYER_NORM, "num_key_value_heads": ""},
        required={"attention_bias": True},
        flags={"use_parallel_residual": "use_parallel_residual"},
        epsilon=_MEAN_EPSILON,
        untied=True,
        partial_rotary=True,
    ),
    Architecture(
        "starcoder2",
        "starcoder2",
        "Starcoder2ForCausalLM",
        _MODEL,
        {
            **_ATTENTION,
            "post_attention_layernorm": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        activation=_GELU,
        keys={**_SQUARE, "rms_norm_eps": "norm_epsilon"},
        required={"use_bias": True},
        epsilon=_MEAN_EPSILON,
        window=True,
    ),
    Architecture(
        "cohere2",
        "cohere2",
        "Cohere2ForCausalLM",
        _MODEL,
        _COHERE,
        keys=_SQUARE | _LAYER_NORM,
        required=_NO_BIAS,
        numbers={"logit_scale": ("logit_scale", None)},
        constants={"rope.scaling.type": "none"},
        epsilon=_MEAN_EPSILON,
        tied=True,
        period=4,
    ),
    Architecture(
        "command-r",
        "cohere",
        "CohereForCausalLM",
        _MODEL,
        _COHERE,
        keys=_SQUARE | _LAYER_NORM,
        required={**_NO_BIAS, "use_qk_norm": False},
        numbers={"logit_scale": ("logit_scale", 1.0)},
        constants={"rope.scaling.type": "none"},
        epsilon=_MEAN_EPSILON,
        tied=True,
    ),
    Architecture(
        "phi2",
        "phi",
        "PhiForCausalLM",
        {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
        {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.dense": "attn_output",
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
        },
        activation="gelu_new",
        keys=_SQUARE | _LAYER_NORM,
        required={"qk_layernorm": False},
        epsilon=_MEAN_EPSILON,
        untied=True,
        partial_rotary=True,
    ),
    Architecture(
        "seed_oss",
        "seed_oss",
        "SeedOssForCausalLM",
        _MODEL,
        {**_ATTENTION, "post_attention_layernorm": "post_attention_norm", **_MLP},
        required={"attention_out_bias": False, "mlp_bias": False},
        biases=_BIAS,
    ),
    Architecture(
        "ernie4_5",
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        _MODEL,
        _LLAMA,
        required={"use_bias": False},
    ),
    Architecture(
        "exaone4",
        "exaone4",
        "Exaone4ForCausalLM",
        _MODEL,
        _NORMS_AFTER,
        extra=_ROPE,
        keys=_SQUARE,
        period=4,
        default_window=True,
        windowed=64,
    ),
    _QWEN35_ROW,
    replace(
        _QWEN35_ROW,
        name="qwen35moe",
        model_type="qwen3_5_moe_text",
        cls="Qwen3_5MoeForCausalLM",
        block={**_DELTA, **_QWEN_EXPERTS, **_SHARED_EXPERT},
        keys={"intermediate_size": ""},
        counts=_SHARED_COUNTS,
        experts="num_experts",
    ),
)

ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    name: tuple(row for row in _ROWS if row.name == name) for name in dict.fromkeys(row.name for row in _ROWS)
}
TYPES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}  # transformers' type -> its row


def of_file(metadata: Mapping[str, Any]) -> Architecture | None:
    """The row for a file with these keys; None if fewbit does not know its architecture."""
    name = metadata.get("general.architecture")
    rows = ARCHITECTURES.get(name, ()) if isinstance(name, str) else ()
    special = (row for row in rows if row.when and metadata.get(f"{name}.{row.when}"))
    return next(special, next((row for row in rows if not row.when), None))
