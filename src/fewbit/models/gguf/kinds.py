"""Layers with full attention whose heads differ from those with a sliding window, as the metadata of a GGUF file.

transformers (Gemma 4)                            file (`a` is the name of the architecture)
head_dim                                          a.attention.key_length_swa, a.attention.value_length_swa
  of a layer in per_layer_config                  a.attention.key_length, a.attention.value_length
num_key_value_heads, also in per_layer_config     a.attention.head_count_kv, of each layer if they differ
num_kv_shared_layers                              a.attention.shared_kv_layers: the last layers, which have no keys and
                                                  values of their own
use_double_wide_mlp                               a.feed_forward_length of each layer: these layers have twice the width
attention_k_eq_v                                  no attn_v in layers with full attention
final_logit_softcapping                           a.final_logit_softcapping, or 0: llama.cpp takes 30 without it

Other types
num_attention_heads_per_layer (Laguna)            a.attention.head_count of each layer
num_key_value_heads (MiMo V2 Flash)               a.attention.head_count_kv of each layer: twice as many in windows
v_head_dim (MiMo V2 Flash)                        a.attention.value_length
gating (Laguna)                                   whether attn_gate has a row for each head, or for each column of it
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import inf
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.models.gguf.architecture import Architecture

_SPARSITY = 0.95
_FULL, _SLIDING = "full_attention", "sliding_attention"
_KINDS = (_FULL, _SLIDING)
_KV, _WIDTH = "num_key_value_heads", "head_dim"


def common(config: Any, arch: Architecture) -> Any:
    """A copy of the config that has the entries of layers without entries of their own.

    PlanError if some layers have their own, and llama.cpp's architecture has none such.
    """
    if not getattr(config, "is_heterogeneous", False):
        return config
    if not arch.two_kinds:
        raise PlanError(f"llama.cpp runs {arch.name} with layers of one size; this model has a per_layer_config")
    found = copy.copy(config)
    found.per_layer_config = None
    return found


def to_keys(whole: Any, config: Any) -> dict[str, Any]:
    """The keys of a model with two kinds of heads. PlanError if llama.cpp would compute something else.

    whole: transformers' config. config: what `common` made of it.
    """
    full, local = ({(each.head_dim, each.num_key_value_heads) for each in _layers(whole, kind)} for kind in _KINDS)
    if len(full) != 1 or len(local) != 1:
        raise PlanError(
            f"a GGUF file of {config.model_type} has layers of both {_FULL} and {_SLIDING}, with one width and number "
            f"of heads for each; this model has {sorted(full)} and {sorted(local)}"
        )
    if config.use_bidirectional_attention == "all":
        raise PlanError("llama.cpp runs text with causal attention; this model has use_bidirectional_attention = all")
    rows = getattr(config, "vocab_size_per_layer_input", config.vocab_size)
    if getattr(config, "hidden_size_per_layer_input", 0) and rows != config.vocab_size:
        raise PlanError(
            f"llama.cpp runs {config.model_type} with vocab_size_per_layer_input = vocab_size; this model has {rows} "
            f"and {config.vocab_size}"
        )
    check_sharing(config, config.num_hidden_layers - config.num_kv_shared_layers)
    ((width, kv),), ((own, own_kv),) = full, local
    sliding = [kind == _SLIDING for kind in config.layer_types]
    found: dict[str, Any] = {
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.key_length_swa": own,
        "attention.value_length_swa": own,
        "rope.dimension_count": width,
        "rope.dimension_count_swa": own,
        "rope.freq_base_swa": float(config.rope_parameters[_SLIDING]["rope_theta"]),
        "attention.sliding_window_pattern": np.array(sliding),
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
    }
    found["attention.head_count_kv"] = own_kv
    if kv != own_kv:
        found["attention.head_count_kv"] = np.array([own_kv if each else kv for each in sliding], np.int32)
    if config.use_double_wide_mlp:
        found["feed_forward_length"] = np.array(_widths(config), np.int32)
    return found


def width(config: Any) -> int:
    """The width of a head with full attention."""
    return int(max(each.head_dim for each in _layers(config, _FULL)))


def sparsity(arch: Architecture, layers: int) -> list[float]:
    """The part of the gate that the MLP of each layer sets to 0."""
    return [_SPARSITY] * min(arch.sparse, layers) + [0.0] * max(layers - arch.sparse, 0)


def fixed_to_keys(config: Any, arch: Architecture) -> dict[str, Any]:
    """The keys of what llama.cpp knows without them. PlanError if it differs."""
    layers, shared = config.num_hidden_layers, max(config.num_hidden_layers - arch.unshared, 0)
    if list(config.activation_sparsity_pattern) != (wanted := sparsity(arch, layers)):
        raise PlanError(
            f"llama.cpp runs {arch.name} with activation_sparsity_pattern = {wanted}; this model has "
            f"{list(config.activation_sparsity_pattern)}"
        )
    if config.num_kv_shared_layers != shared:
        raise PlanError(
            f"llama.cpp runs {arch.name} with keys and values of its own in the first {arch.unshared} layers, which is "
            f"num_kv_shared_layers = {shared} of {layers}; this model has {config.num_kv_shared_layers}"
        )
    check_sharing(config, layers - shared)
    deviations = [NormalDist().inv_cdf(share) if share else -inf for share in wanted]
    return {
        "attention.shared_kv_layers": shared,
        "activation_sparsity_scale": np.array(deviations, np.float32),
        "attention.sliding_window_pattern": np.array([kind == _SLIDING for kind in config.layer_types]),
    }


def extra_tensors(config: Any, arch: Architecture) -> dict[str, Tensor]:
    """Keys and values, 0 in float16, of layers that use those of an earlier one: llama.cpp loads them, and no more."""
    found: dict[str, Tensor] = {}
    for layer in range(arch.unshared, config.num_hidden_layers) if arch.unshared else ():
        rows = config.num_key_value_heads * config.head_dim
        for name, shape in (("k", (rows, config.hidden_size)), ("v", (rows, config.hidden_size))):
            found[f"blk.{layer}.attn_{name}.weight"] = torch.zeros(shape, dtype=torch.float16, device="cpu")
        norm = torch.ones(config.head_dim, dtype=torch.float32, device="cpu")
        found[f"blk.{layer}.attn_k_norm.weight"] = norm
    return found


def check_sharing(config: Any, first: int) -> None:
    """PlanError if llama.cpp gives layers other keys and values than the model does.

    first: the first layer that has none of its own.
    """
    if first < min(2, config.num_hidden_layers):
        raise PlanError(
            f"llama.cpp runs {config.model_type} with at least 2 layers with keys and values of their own; this model "
            f"has {max(first, 0)}"
        )
    before = list(config.layer_types[max(first - 2, 0) : first])
    if first < config.num_hidden_layers and before != [_SLIDING, _FULL]:
        raise PlanError(
            f"llama.cpp takes keys and values of layer {first - 2} for layers with a sliding window, and of layer "
            f"{first - 1} for those with full attention; these layers of this model have {before}"
        )


def _layers(config: Any, wanted: str) -> list[Any]:
    """The configs of the layers of a kind."""
    return [config.per_layer_config[layer] for layer, kind in enumerate(config.layer_types) if kind == wanted]


def _widths(config: Any) -> list[int]:
    """The width of the MLP of each layer."""
    first = config.num_hidden_layers - config.num_kv_shared_layers
    return [config.intermediate_size * (1 + (layer >= first)) for layer in range(config.num_hidden_layers)]


def of_keys(keys: Any, layers: int) -> dict[str, Any]:
    """Entries of config.json for two kinds of heads. keys: a file's `Metadata` (metadata.py)."""
    sliding = keys.get("attention.sliding_window_pattern")
    if not isinstance(sliding, np.ndarray) or len(sliding) != layers or sliding.all():
        raise keys.wrong("it does not say which layers have a sliding window, or all have one")
    local = [bool(each) for each in sliding]
    heads = _each(keys, "attention.head_count_kv", layers)
    widths = _each(keys, "feed_forward_length", layers)
    full = {kv for kv, one in zip(heads, local, strict=True) if not one}
    own = {kv for kv, one in zip(heads, local, strict=True) if one} or full
    shared = keys.whole("attention.shared_kv_layers")
    double = shared > 0 and widths[-1] == 2 * widths[0]
    wanted = [widths[0] * (1 + (double and layer >= layers - shared)) for layer in range(layers)]
    if len(full) != 1 or len(own) != 1 or widths != wanted:
        raise keys.wrong(f"its layers have {sorted({*full, *own})} key-value heads and MLPs of width {widths}")
    first = local.index(False)
    return {
        "vocab_size_per_layer_input": keys.shape("token_embd.weight")[0],
        _WIDTH: keys.count("attention.key_length_swa"),
        _KV: min(own),
        "per_layer_config": {
            str(layer): {_WIDTH: keys.count("attention.key_length"), _KV: min(full)}
            for layer, one in enumerate(local)
            if not one
        },
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0) or None,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": double,
        "attention_k_eq_v": f"blk.{first}.attn_v.weight" not in keys.file.entries,
    }


def heads_to_keys(config: Any, arch: Architecture) -> dict[str, Any]:
    """The keys of heads that differ by layer, and of values of another width than keys."""
    found: dict[str, Any] = {}
    if arch.query_heads:
        found["attention.head_count"] = np.array(getattr(config, arch.query_heads), np.int32)
    if arch.value_width:
        found["attention.value_length"] = int(getattr(config, arch.value_width))
    if arch.kv_in_windows > 1:
        times = [arch.kv_in_windows if kind == _SLIDING else 1 for kind in config.layer_types]
        found["attention.head_count_kv"] = np.array(times, np.int32) * config.num_key_value_heads
    return found


def shared_heads(config: Any, arch: Architecture) -> int:
    """How many query heads of the first layer share a key-value head, as its file says it. 0 without attention."""
    if not arch.attention:
        return 0
    kinds = getattr(config, "layer_types", None) or [""]
    first = (getattr(config, "per_layer_config", None) or [config])[0]
    heads: int = getattr(first, arch.keys.get("num_attention_heads", "num_attention_heads"))
    if arch.query_heads:
        heads = getattr(config, arch.query_heads)[0]
    if arch.without_attention and kinds[0] in (arch.without_attention, arch.mlp_alone):
        return 0
    if arch.latent and not arch.expanded:
        return heads
    kv = getattr(first, arch.keys.get("num_key_value_heads", "num_key_value_heads"), None) or heads
    kv = int(arch.constants.get("attention.head_count_kv", kv))
    return heads // (kv * arch.kv_in_windows if kinds[0] == _SLIDING else kv)


def query_heads(keys: Any, layers: int) -> list[int]:
    """The query heads of each layer. keys: a file's `Metadata` (metadata.py)."""
    if keys.architecture.query_heads:
        return _each(keys, "attention.head_count", layers)
    return [keys.count("attention.head_count")] * layers


def fewest_kv_heads(keys: Any, sliding: Sequence[bool]) -> int:
    """The key-value heads of layers with full attention. sliding: which layers have a window."""
    found = _each(keys, "attention.head_count_kv", len(sliding))
    times = [keys.architecture.kv_in_windows if one else 1 for one in sliding]
    fewest = found[0] // times[0]
    if found != [fewest * each for each in times]:
        raise keys.wrong(
            f"its layers have {found} key-value heads; those with a sliding window must have "
            f"{keys.architecture.kv_in_windows} times as many as others"
        )
    return fewest


def gates(keys: Any, heads: int) -> str:
    """What attention has gates for. heads: the query heads of the first layer."""
    return "per-head" if keys.shape("blk.0.attn_gate.weight")[0] == heads else "per-element"


def _each(keys: Any, key: str, layers: int) -> list[int]:
    """The value of each layer, which all have or each has. A list may go on with blocks that predict further tokens."""
    found = keys.get(key)
    if not isinstance(found, np.ndarray):
        return [keys.count(key)] * layers
    more = keys.whole("nextn_predict_layers")
    found = found[:layers] if len(found) == layers + more else found
    if found.dtype.kind not in "iu" or len(found) != layers or not all(0 < each < 1 << 24 for each in found.tolist()):
        raise keys.wrong(f"{key} is no list of {layers} numbers above 0")
    each: list[int] = found.tolist()
    return each
