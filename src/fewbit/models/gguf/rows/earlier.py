"""Dense architectures from before Llama: tables of positions, ALiBi, and queries, keys and values in one matrix."""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.gguf.architecture import Architecture, Cut, Piece
from fewbit.models.gguf.rows.shared import GELU, LAYER_NORM, MEAN_EPSILON, SQUARE

GPT2_ROW = Architecture(
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
    layers=("transformer.h",),
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
    epsilon=MEAN_EPSILON,
)
# Attention and MLP side by side, with a norm each. Queries that share keys and values come before these in a matrix
_FALCON_MODEL = {
    "transformer.word_embeddings": "token_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
_FALCON = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_FALCON_NORMS = "num_ln_in_parallel_attn"
FALCON_ROW = Architecture(
    "falcon",
    "falcon",
    "FalconForCausalLM",
    _FALCON_MODEL,
    {"ln_mlp": "attn_norm", "ln_attn": "attn_norm_2", **_FALCON},
    layers=("transformer.h",),
    cut={
        "attn_qkv": Cut(
            "num_kv_heads",
            (Piece("attn_qkv", (("hidden_size",), ("num_kv_heads", "head_dim"), ("num_kv_heads", "head_dim"))),),
        )
    },
    when=("blk.0.attn_norm_2.weight",),
    chosen={"new_decoder_architecture": True},
    activation="",
    keys={
        **SQUARE,
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_hidden_size",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    fixed={"new_decoder_architecture": True, _FALCON_NORMS: 2},
    required={"activation": "gelu", "alibi": False, "bias": False, "parallel_attn": True},
    constants={"tensor_data_layout": "jploski"},
    epsilon=MEAN_EPSILON,
)
FALCON_1_NORM_ROW = replace(
    FALCON_ROW,
    block={"input_layernorm": "attn_norm", **_FALCON},
    when=(),
    chosen={**FALCON_ROW.chosen, _FALCON_NORMS: 1},
    fixed={**FALCON_ROW.fixed, _FALCON_NORMS: 1},
)

ROWS = (
    GPT2_ROW,
    Architecture(
        "starcoder",
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        GPT2_ROW.model,
        GPT2_ROW.block,
        layers=GPT2_ROW.layers,
        activation=GELU,
        keys=GPT2_ROW.keys,
        fixed={"activation_function": GELU},
        required={"multi_query": True},
        constants={"attention.head_count_kv": 1},
        epsilon=MEAN_EPSILON,
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
        layers=("gpt_neox.layers",),
        mixed=True,
        activation="gelu",
        keys={**SQUARE, **LAYER_NORM, "num_key_value_heads": ""},
        required={"attention_bias": True},
        flags={"use_parallel_residual": "use_parallel_residual"},
        epsilon=MEAN_EPSILON,
        untied=True,
        partial_rotary=True,
    ),
    FALCON_1_NORM_ROW,
    FALCON_ROW,
    # The first models: one key-value head. Their files are read as those of later ones
    replace(
        FALCON_1_NORM_ROW,
        cut={},
        chosen={},
        keys={**FALCON_ROW.keys, "num_key_value_heads": ""},
        required={**FALCON_ROW.required, "multi_query": True},
        constants={**FALCON_ROW.constants, "attention.head_count_kv": 1},
    ),
    Architecture(
        "bloom",
        "bloom",
        "BloomForCausalLM",
        {**_FALCON_MODEL, "transformer.word_embeddings_layernorm": "token_embd_norm"},
        {"input_layernorm": "attn_norm", **_FALCON, "post_attention_layernorm": "ffn_norm"},
        layers=("transformer.h",),
        mixed=True,
        activation="",
        keys={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        required={"apply_residual_connection_post_layernorm": False},
        products={"attention.head_count_kv": ("n_head",)},
        epsilon=MEAN_EPSILON,
        alibi=True,
    ),
    Architecture(
        "mpt",
        "mpt",
        "MptForCausalLM",
        {"transformer.wte": "token_embd", "transformer.norm_f": "output_norm", "lm_head": "output"},
        {
            "norm_1": "attn_norm",
            "attn.Wqkv": "attn_qkv",
            "attn.out_proj": "attn_output",
            "norm_2": "ffn_norm",
            "ffn.up_proj": "ffn_up",
            "ffn.down_proj": "ffn_down",
        },
        layers=("transformer.blocks",),
        activation="",
        keys={
            "num_hidden_layers": "n_layers",
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        required={
            "attn_config.alibi": True,
            "attn_config.alibi_bias_max": 8,
            "attn_config.qk_ln": False,
            "attn_config.softmax_scale": None,
        },
        constants={"attention.max_alibi_bias": 8.0},
        optional={"attn_config.clip_qkv": "attention.clamp_kqv"},
        epsilon=MEAN_EPSILON,
        alibi=True,
    ),
)
