"""Names of tensors in a GGUF file, and the conversions of their values, for each architecture.

transformers' names are those of the modules (`Skeleton.name_of`, `named_parameters`). Besides the name, three things
can differ. None of them affects quantization:

    rows        Llama's q and k: transformers rotates the halves of a head (i with i + d/2), llama.cpp neighbours (2i
                with 2i + 1). So row 2i + j of a head in the file is row i + j d/2 of the model's weight
    transposed  GPT-2's Conv1D stores [K, N]; a file stores [N, K], as for every linear
    shift       Gemma's norms multiply by 1 + w; a file stores this sum

    route = routes(config)["model.layers.0.self_attn.q_proj.weight"]     # KeyError: no file contains it
    route.name, route.rows                                               # "blk.0.attn_q.weight", int64 [N] or None
    route.to_file(tensor), route.from_file(tensor)                       # both directions, for unquantized weights
    blocks[route.rows]                                                   # for quantized weights [N, K]

A row of blocks encodes one row of the weight, so permuting rows is exact for every type.
Source: gguf-py's name tables and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import PlanError


@dataclass(frozen=True)
class Route:
    """The name of a model's tensor in the file, and its conversion."""

    name: str
    heads: int = 0  # number of heads whose rows are permuted, else 0
    transposed: bool = False
    shift: float = 0.0
    count: int = 0  # number of permuted rows

    @property
    def rows(self) -> Tensor | None:
        """Row i of the file is row `rows[i]` of the model's weight [N, K]; None if the order is the same."""
        if not self.heads:
            return None
        rows = torch.arange(self.count, dtype=torch.int64, device="cpu")
        return rows.reshape(self.heads, 2, -1).transpose(1, 2).flatten()

    @property
    def rows_back(self) -> Tensor | None:
        """Row i of the model's weight is row `rows_back[i]` of the file; None if the order is the same."""
        return None if self.rows is None else self.rows.argsort()

    def to_file(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of the model to the file's layout and values."""
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor.float() + self.shift if self.shift else tensor

    def from_file(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of the file to the model's layout and values."""
        tensor = tensor if self.rows_back is None else tensor[self.rows_back]
        tensor = tensor.float() - self.shift if self.shift else tensor
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: all that fewbit knows of it, as one row of `ARCHITECTURES`.

    The defaults are the common case. Code reads these fields and never compares the name.
    """

    name: str
    model_types: tuple[str, ...]  # transformers' types; the last one is for a sliding window in all layers
    classes: tuple[str, ...]  # transformers' classes of these types
    # Names of the tensors, without `.weight` and `.bias`
    model: Mapping[str, str]  # module names outside blocks -> names in the file
    block: Mapping[str, str]  # the same for modules in a block
    layers: str = "model.layers"
    extra: frozenset[str] = field(default_factory=frozenset)  # tensors of the file that are not weights
    # Values of the tensors
    permuted: bool = False  # rows of q and k are in llama.cpp's order
    transposed: bool = False  # the model's linears are Conv1D
    shift: float = 0.0  # added to the weights of norms
    # Config
    activation: str = "silu"  # of the MLP
    keys: Mapping[str, str] = field(default_factory=dict)  # names in config.json that differ from Llama's
    fixed: Mapping[str, Any] = field(default_factory=dict)  # further entries of config.json
    epsilon: str = "attention.layer_norm_rms_epsilon"  # the file's key
    # entry of config.json -> tensor of the file; the entry is true if the file has the tensor
    biases: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False  # the output head is always the embedding
    # Positions
    partial_rotary: bool = False  # RoPE may rotate only the first columns of a head
    local_theta: float | None = None  # RoPE base of layers with a sliding window, if they have their own
    original_context: bool = False  # config.json has the length before RoPE was scaled
    # Sliding windows
    window: bool = False  # all layers may have one
    no_window: bool = False  # a file needs a key to say that there is no window
    period: int = 0  # every n-th layer has full attention and the others have a window; 0 without such layers
    default_window: bool = False  # a file without a key for the window has one
    # Number of layers of the model whose queries are scaled by hidden / heads instead of the width of a head
    scaled_by_hidden: int = 0

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
_ROPE = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_GELU = "gelu_pytorch_tanh"

ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(
            "llama",
            ("llama", "mistral"),
            ("LlamaForCausalLM", "MistralForCausalLM"),
            _MODEL,
            _LLAMA,
            extra=_ROPE,
            permuted=True,
            biases={**_BIAS, "mlp_bias": "blk.0.ffn_down.bias"},
            window=True,
        ),
        Architecture("qwen2", ("qwen2",), ("Qwen2ForCausalLM",), _MODEL, _LLAMA, extra=_ROPE),
        Architecture(
            "qwen3", ("qwen3",), ("Qwen3ForCausalLM",), _MODEL, _LLAMA | _HEAD_NORMS, extra=_ROPE, biases=_BIAS
        ),
        Architecture(
            "gemma2",
            ("gemma2",),
            ("Gemma2ForCausalLM",),
            _MODEL,
            _GEMMA2,
            shift=1.0,
            activation=_GELU,
            tied=True,
            period=2,
            default_window=True,
            scaled_by_hidden=46,
        ),
        Architecture(
            "gemma3",
            ("gemma3_text",),
            ("Gemma3ForCausalLM",),
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
            ("phi3",),
            ("Phi3ForCausalLM",),
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
            ("gpt2",),
            ("GPT2LMHeadModel",),
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
            epsilon="attention.layer_norm_epsilon",
        ),
    )
}


def architecture(model_type: str) -> Architecture:
    """llama.cpp's architecture for transformers' `model_type`. PlanError if fewbit does not know one."""
    for each in ARCHITECTURES.values():
        if model_type in each.model_types:
            return each
    known = sorted(name for each in ARCHITECTURES.values() for name in each.model_types)
    raise PlanError(
        f"no GGUF file can be made of a model of type {model_type!r}", f"Supported types: {', '.join(known)}."
    )


def routes(config: Any) -> dict[str, Route]:
    """transformers' name -> route, for every tensor that a model of this config can have.

    config: transformers' config object. Of a tied pair, write the embedding.
    """
    arch = architecture(config.model_type)
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    permuted = {"self_attn.q_proj": heads, "self_attn.k_proj": kv} if arch.permuted else {}
    found = {}
    for theirs, ours in arch.model.items():
        for leaf in ("weight", "bias"):
            shift = arch.shift if ours == "output_norm" and leaf == "weight" else 0.0
            found[f"{theirs}.{leaf}"] = Route(f"{ours}.{leaf}", shift=shift)
    for layer in range(config.num_hidden_layers):
        for theirs, ours in arch.block.items():
            norm, count = "norm" in ours, permuted.get(theirs, 0)
            for leaf in ("weight", "bias"):
                found[f"{arch.layers}.{layer}.{theirs}.{leaf}"] = Route(
                    f"blk.{layer}.{ours}.{leaf}",
                    heads=count,
                    count=count * width,
                    transposed=arch.transposed and leaf == "weight" and not norm,
                    shift=arch.shift if norm and leaf == "weight" else 0.0,
                )
    return found
