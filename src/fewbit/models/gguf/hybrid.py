"""Layers of several kinds as the metadata of a GGUF file: linear attention, and blocks after the last layer.

transformers (Qwen 3.5)                           file (`a` is the name of the architecture)
linear_conv_kernel_dim, linear_key_head_dim       a.ssm.conv_kernel, a.ssm.state_size
linear_num_key_heads, linear_num_value_heads      a.ssm.group_count, a.ssm.time_step_rank
linear_value_head_dim                             a.ssm.inner_size / a.ssm.time_step_rank
layer_types                                       a.attention.recurrent_layers, or a.full_attention_interval
  (LFM2)                                          a.attention.head_count_kv of each layer: 0 without attention
  (Nemotron-H)                                    a.feed_forward_length of each layer too: 0 without an MLP
mlp_layer_types (GLM 4.7)                         a.leading_dense_block_count
attn_layer_period, attn_layer_offset (Jamba)      the same list; one of so many layers has attention
none: a block that predicts further tokens        a.nextn_predict_layers, which a.block_count includes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.pieces import Joined

_HEADS, _WIDTHS = ("attention.head_count_kv", "key-value heads"), ("feed_forward_length", "MLP widths")
_LEADING, _DENSE, _SPARSE = "leading_dense_block_count", "dense", "sparse"
_INTERVAL = 4  # every n-th layer has full attention if a file has no key for it


def beyond(file: GgufFile | Joined) -> frozenset[str]:
    """Tensors that transformers has no modules for: blocks that predict further tokens, and keys and values of layers
    that use those of an earlier layer."""
    name = file.metadata.get("general.architecture")
    keys = ("block_count", "nextn_predict_layers", "attention.shared_kv_layers")
    count, more, shared = (file.metadata.get(f"{name}.{key}", 0) for key in keys)
    if not all(isinstance(each, int) for each in (count, more, shared)):
        return frozenset()
    blocks = {f"blk.{layer}." for layer in range(count - more, count)} if 0 < more < min(count, 100) else set()
    unused = range(count - shared, count) if 0 < shared < min(count, 1000) else ()
    own = {f"blk.{layer}.attn_{each}.weight" for layer in unused for each in ("k", "v", "k_norm")}
    return frozenset(each for each in file.entries if each[: each.find(".", 4) + 1] in blocks or each in own)


def to_keys(config: Any) -> dict[str, Any]:
    """The keys of a model with linear attention. PlanError if llama.cpp would compute something else."""
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    if keys != values:
        raise PlanError(f"llama.cpp runs linear attention with keys and values of one width; here {keys} and {values}")
    linear = [kind == "linear_attention" for kind in config.layer_types]
    regular = (n for n in range(1, len(linear) + 1) if linear == _every(n, len(linear)))
    return {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": keys,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": values * config.linear_num_value_heads,
        "attention.recurrent_layers": np.array(linear),
        "full_attention_interval": next(regular, _INTERVAL),
    }


def of_keys(keys: Any, layers: int) -> dict[str, Any]:
    """Entries of config.json for linear attention. keys: a file's `Metadata` (metadata.py)."""
    heads, groups, inner = (keys.count(f"ssm.{key}") for key in ("time_step_rank", "group_count", "inner_size"))
    if inner % heads or heads % groups:
        raise keys.wrong(f"{heads} value heads fit neither {inner} columns nor {groups} key heads")
    linear: Sequence[Any] = _every(keys.count("full_attention_interval", _INTERVAL), layers)
    if isinstance(found := keys.get("attention.recurrent_layers"), np.ndarray):
        linear = found.tolist()[:layers]
        if len(linear) != layers:
            raise keys.wrong(f"the kinds of {len(linear)} layers are given, not of {layers}")
    return {
        "linear_conv_kernel_dim": keys.count("ssm.conv_kernel"),
        "linear_key_head_dim": keys.count("ssm.state_size"),
        "linear_num_key_heads": groups,
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "layer_types": ["linear_attention" if each else "full_attention" for each in linear],
    }


def adjusted(config: Any, width: int) -> int:
    """The width of the MLP. LFM2's config may give one that is still to be multiplied and rounded up."""
    if not getattr(config, "block_auto_adjust_ff_dim", False):
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is not None:
        step = config.block_multiple_of
        width = -(-int(config.block_ffn_dim_multiplier * width) // step) * step
    return width


def layers_to_keys(config: Any, arch: Architecture, width: int) -> dict[str, Any]:
    """The key-value heads of each layer, int32, and the width of its MLP if not all have one. 0 in layers without.

    width: that of an MLP.
    """
    kinds, without = config.layer_types, arch.without_attention
    if without not in kinds:
        raise PlanError(f"llama.cpp runs {config.model_type} with layers of type {without}; this model has none")
    each = 1 if arch.latent else config.num_key_value_heads
    heads = [0 if kind in (without, arch.mlp_alone) else each for kind in kinds]
    found = {"attention.head_count_kv": np.array(heads, np.int32)}
    if arch.mlp_alone:
        found["feed_forward_length"] = np.array([width * (kind == arch.mlp_alone) for kind in kinds], np.int32)
    return found


def dense_to_keys(kinds: Sequence[str]) -> dict[str, Any]:
    """How many layers come before those with experts, by the types of MLPs."""
    count = next((place for place, kind in enumerate(kinds) if kind != _DENSE), len(kinds))
    if set(kinds[count:]) - {_SPARSE}:
        raise PlanError(f"a GGUF file has layers with experts after all others; the MLPs of this model are {kinds}")
    return {_LEADING: count}


def dense_of_keys(keys: Any, layers: int) -> list[str]:
    """The types of MLPs of a file's model. keys: its `Metadata` (metadata.py)."""
    return [_SPARSE if each else _DENSE for each in _routed(keys, layers)]


def _routed(keys: Any, layers: int) -> list[bool]:
    """Which layers have a router."""
    return [f"blk.{layer}.ffn_gate_inp.weight" in keys.file.entries for layer in range(layers)]


def kv_heads(keys: Any) -> int:
    """The key-value heads of each layer with attention. keys: a file's `Metadata` (metadata.py)."""
    return _one(keys, _HEADS)


def all_sparse(keys: Any) -> bool:
    """Whether a file has experts in all layers, and no width of another MLP. keys: its `Metadata` (metadata.py)."""
    return keys.get(_WIDTHS[0]) is None and keys.get(_LEADING) == 0


def inner(keys: Any) -> int:
    """The width of the MLP of each layer that has one. keys: a file's `Metadata` (metadata.py)."""
    width: int = _one(keys, _WIDTHS) if keys.architecture.mlp_alone else keys.count("feed_forward_length")
    return width


def layers_of_keys(keys: Any, layers: int) -> dict[str, Any]:
    """The types of layers by their key-value heads and the widths of their MLPs, as config.json has them."""
    arch, heads = keys.architecture, _each(keys, _HEADS)
    widths = _each(keys, _WIDTHS) if arch.mlp_alone else [0] * layers
    for each, (_, what) in ((heads, _HEADS), (widths, _WIDTHS)):
        if len(each) != layers:
            raise keys.wrong(f"the {what} of {len(each)} layers are given, not of {layers}")
    if not arch.attention_every:
        rest = ["" if not width else arch.mlp_alone for width in widths]
        kinds = [
            "full_attention" if kv else kind or arch.without_attention for kv, kind in zip(heads, rest, strict=True)
        ]
        return {"layer_types": kinds}
    found: dict[str, Any] = {}
    routed = _routed(keys, layers)
    for names, flags in ((arch.attention_every, [kv > 0 for kv in heads]), (arch.experts_every, routed)):
        found |= dict(zip(names, _regular(keys, flags), strict=True))
    return found


def _regular(keys: Any, flags: Sequence[bool]) -> tuple[int, int]:
    """Every how many layers one has a flag, and which is the first; if none has, a layer behind the last."""
    layers = len(flags)
    for period in range(1, layers + 2):
        for first in range(period):
            if [layer % period == first for layer in range(layers)] == flags:
                return period, first
    raise keys.wrong("its layers of one kind do not have the same number of others between them")


def _one(keys: Any, key: tuple[str, str]) -> int:
    """The value that all layers have, or 0."""
    found = {value for value in _each(keys, key) if value}
    if len(found) > 1 or not all(0 < value < 1 << 24 for value in found):
        raise keys.wrong(f"its layers have {sorted(found)} {key[1]}, where one number is supported")
    return found.pop() if found else 1


def _each(keys: Any, key: tuple[str, str]) -> list[int]:
    """The value of each layer. key: its name, and what it is."""
    found = keys.get(key[0])
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        raise keys.wrong(f"it has no list of the {key[1]} of each layer")
    each: list[int] = found.tolist()
    return each


def _every(interval: int, layers: int) -> list[bool]:
    """Which layers have linear attention if every `interval`-th has full attention."""
    return [(layer + 1) % interval != 0 for layer in range(layers)]
