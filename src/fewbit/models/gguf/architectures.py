"""Every architecture of llama.cpp that fewbit reads and writes, one row for each. CONTRIBUTING.md says how to add one.

Code reads the fields of a row, and never compares its name. A type of transformers whose mathematics llama.cpp does not
have is refused: `required` and its neighbours say what llama.cpp takes for granted.

Source: gguf-py's name tables, and conversion/ and src/models/ of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, as one type of transformers: all that fewbit knows of it.

    The defaults are the common case. Several types may share a name; `when` tells their files apart.
    """

    name: str
    model_type: str  # transformers' type
    cls: str  # transformers' class of this type
    # Names of the tensors, without `.weight` and `.bias`
    model: Mapping[str, str]  # module names outside blocks -> names in the file
    block: Mapping[str, str]  # the same for modules in a block
    layers: str = "model.layers"
    extra: frozenset[str] = field(default_factory=frozenset)  # tensors of the file that are not weights
    when: str = ""  # a file is of this type if it has this key, and it is not 0; "": if it is of no other type
    # Values of the tensors
    permuted: bool = False  # rows of q and k are in llama.cpp's order
    mixed: bool = False  # rows of qkv are in the model's order: q, k, v of the first head, then of the second
    transposed: bool = False  # the model's linears are Conv1D
    shift: float = 0.0  # added to the weights of norms
    # Config
    activation: str = "silu"  # of the MLP
    # Names in config.json that differ from Llama's; "" for entries that it lacks, because they follow from others
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # further entries of config.json
    required: Mapping[str, Any] = field(default_factory=dict)  # entries of config.json that llama.cpp takes for granted
    # Entries of config.json that are numbers -> the file's key, and the value without one; None if it must have the key
    numbers: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)  # entries that are true or false -> the file's key
    constants: Mapping[str, Any] = field(default_factory=dict)  # further keys of the file
    epsilon: str = "attention.layer_norm_rms_epsilon"  # the file's key
    # entry of config.json -> tensor of the file; the entry is true if the file has the tensor
    biases: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False  # the output head is always the embedding
    untied: bool = False  # the output head is never the embedding
    # Positions
    partial_rotary: bool = False  # RoPE may rotate only the first columns of a head
    local_theta: float | None = (
        None  # RoPE base of layers with a sliding window, if they have their own; 0: the others'
    )
    original_context: bool = False  # config.json has the length before RoPE was scaled
    unrotated: int = 0  # every n-th layer has no RoPE; 0 without such layers
    # Sliding windows
    window: bool = False  # all layers may have one
    no_window: bool = False  # a file needs a key to say that there is no window
    period: int = 0  # every n-th layer has full attention and the others have a window; 0 without such layers
    default_window: bool = False  # a file without a key for the window has one
    windowed: int = 0  # windows are used exactly in models with so many layers; 0: by the file's key
    # Number of layers of the model whose queries are scaled by hidden / heads instead of the width of a head. None: the
    # scale of queries and the softcaps of logits are no entries of config.json
    scaled_by_hidden: int | None = None

    @property
    def rotary(self) -> bool:
        """Whether positions are rotations of queries and keys (RoPE); else the model has a table of positions."""
        return "position_embd" not in self.model.values()

    @property
    def joined(self) -> bool:
        """Whether q, k and v are one linear."""
        return "attn_qkv" in self.block.values()


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

_ROWS = (
    _LLAMA_ROW,
    replace(_LLAMA_ROW, model_type="mistral", cls="MistralForCausalLM", window=True, when="attention.sliding_window"),
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
        numbers={
            "attention_multiplier": ("attention.scale", None),
            "embedding_multiplier": ("embedding_scale", 1.0),
            "residual_multiplier": ("residual_scale", 1.0),
            "logits_scaling": ("logit_scale", None),
        },
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
