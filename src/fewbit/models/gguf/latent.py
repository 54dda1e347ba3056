"""Multi-head latent attention (MLA) as the metadata of a GGUF file.

The keys and values of a token are one short vector, its latent, which a matrix expands to those of all heads. llama.cpp
multiplies this matrix into queries and outputs instead, and keeps one head: the latent with the key's part that RoPE
turns.

transformers (DeepSeek)                           file (`a` is the name of the architecture)
kv_lora_rank, q_lora_rank                         a.attention.kv_lora_rank, a.attention.q_lora_rank
qk_nope_head_dim + qk_rope_head_dim, v_head_dim   a.attention.key_length_mla, a.attention.value_length_mla
kv_lora_rank + qk_rope_head_dim, kv_lora_rank     a.attention.key_length, a.attention.value_length of its one head
qk_rope_head_dim                                  a.rope.dimension_count
mscale_all_dim / 10                               a.rope.scaling.yarn_log_multiplier

Files from before 2025-04 have the expanded matrix whole, and key_length and value_length are those of the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbit.errors import PlanError
from fewbit.models.gguf.architecture import Architecture

_COMPRESSED = "attn_kv_a_mqa.weight"
# In llama.cpp, the queries of deepseek2 have no latent if the model has so many layers, and else they have one.
_LITE_LAYERS, _LITE = (26, 27), (48, 128256)  # the second with the size of the vocabulary


def to_keys(config: Any, arch: Architecture, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model with latents. PlanError if llama.cpp would compute something else. rope: its positions."""
    layers, rank = config.num_hidden_layers, config.kv_lora_rank
    if arch.expanded:
        return _expanded(config, rope)
    lite = arch.lite and (layers in _LITE_LAYERS or (layers, config.vocab_size) == _LITE)
    if "q_lora_rank" not in arch.required and lite != (config.q_lora_rank is None):
        raise PlanError(
            f"llama.cpp runs a model of {layers} layers with q_lora_rank {'= None' if lite else 'above 0'}; this model "
            f"has {config.q_lora_rank}"
        )
    if (indexed := getattr(config, "index_head_dim", 64)) % 64:
        raise PlanError(
            f"llama.cpp runs indexers with a multiple of 64 columns; this model's index_head_dim is {indexed}"
        )
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn") or rope.get("partial_rotary_factor", 1.0) != 1:
        raise PlanError(f"llama.cpp runs latent attention with whole RoPE, unscaled or by YaRN; this model has {rope}")
    scale = rope.get("mscale_all_dim") or 0.0
    if kind == "yarn" and (scale == 0 or rope.get("mscale") != scale or rope.get("attention_factor") is not None):
        raise PlanError(
            "llama.cpp scales latent attention as if mscale = mscale_all_dim in YaRN, without attention_factor; this "
            f"model has mscale = {rope.get('mscale')}, mscale_all_dim = {scale} and attention_factor = "
            f"{rope.get('attention_factor')}"
        )
    return {
        **({} if arch.without_attention else {"attention.head_count_kv": 1}),
        "attention.key_length": rank + config.qk_rope_head_dim,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": rank,
        **({} if config.q_lora_rank is None else {"attention.q_lora_rank": config.q_lora_rank}),
        "rope.dimension_count": config.qk_rope_head_dim,
        **({"rope.scaling.yarn_log_multiplier": 0.1 * scale} if kind == "yarn" else {}),
    }


def _expanded(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model whose latents llama.cpp expands."""
    width = config.hidden_size // config.num_attention_heads
    if config.q_lora_rank is None or config.v_head_dim != width:
        raise PlanError(
            f"llama.cpp runs {config.model_type} with latents of queries and v_head_dim = {width}; this model has "
            f"q_lora_rank = {config.q_lora_rank} and v_head_dim = {config.v_head_dim}"
        )
    if rope.get("rope_type", "default") != "default" and (scale := rope.get("mscale_all_dim")):
        raise PlanError(
            f"llama.cpp runs {config.model_type} with scaled RoPE without mscale_all_dim; this model has {scale}"
        )
    return {
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": width,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


def of_keys(keys: Any, heads: int) -> dict[str, Any]:
    """Entries of config.json for latents. keys: a file's `Metadata` (metadata.py)."""
    if keys.get("attention.temperature_scale"):
        raise keys.wrong("it scales queries by their position, which transformers' models of this kind do not")
    ending = "" if keys.get("attention.key_length_mla") is None else "_mla"
    width, turned = keys.count(f"attention.key_length{ending}"), keys.count("rope.dimension_count")
    compressed = keys.first("attn_q_a.weight") in keys.file.entries
    block = keys.first(_COMPRESSED).removesuffix(_COMPRESSED)  # the first one with latents
    rows = keys.shape(f"{block}{'attn_q_b' if compressed else 'attn_q'}.weight")[0]
    if turned >= width or rows != heads * width:
        raise keys.wrong(f"{rows} rows of queries do not fit {heads} heads of width {width}, {turned} of them turned")
    return {
        "num_key_value_heads": heads,
        "kv_lora_rank": keys.count("attention.kv_lora_rank"),
        "q_lora_rank": keys.count("attention.q_lora_rank") if compressed else None,
        "qk_nope_head_dim": width - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": keys.count(f"attention.value_length{ending}", keys.count("embedding_length") // heads),
        "intermediate_size": keys.count("feed_forward_length"),
    }


def scaled(keys: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The positions with the scale of attention that a file gives them. keys: a file's `Metadata` (metadata.py)."""
    if rope["rope_type"] == "default" or keys.architecture.expanded:
        return dict(rope)
    if rope["rope_type"] != "yarn" or not keys.get("rope.scaling.yarn_log_multiplier"):
        raise keys.wrong("it scales RoPE in a way that transformers' models with latent attention do not")
    scale = round(10 * keys.real("rope.scaling.yarn_log_multiplier"), 6)
    return {**rope, "mscale": scale, "mscale_all_dim": scale}
