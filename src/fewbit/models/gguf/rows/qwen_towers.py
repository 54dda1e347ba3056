"""Vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen 3.5, of EXAONE 4.5 and of GLM-4.5V.

Source: conversion/ and tools/mtmd/clip.cpp of llama.cpp, and the configs of the published models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fewbit.models.gguf.metadata import Keys
from fewbit.models.gguf.rows.shared import GELU
from fewbit.models.gguf.tower import Tower

_QWEN_SIZES = {
    "depth": "block_count",
    "num_heads": "attention.head_count",
    "patch_size": "patch_size",
}
_QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def merge(keys: Keys, usual: int) -> int:
    """Patches in a row, of which one vector is made."""
    return keys.count("vision.spatial_merge_size", usual)


def _area(least: int, most: int, keys: Keys) -> Mapping[str, Any]:
    """Settings of Qwen's images. least, most: pixels of an image in published models, as a file has no key for them."""
    limits = (keys.count("vision.image_min_pixels", least), keys.count("vision.image_max_pixels", most))
    return {
        "patch_size": keys.count("vision.patch_size"),
        "merge_size": merge(keys, 2),
        "size": dict(zip(("shortest_edge", "longest_edge"), limits, strict=True)),
    }


def _inner(keys: Keys) -> int:
    """The inner width of MLPs. Older files have 0 as their feed_forward_length."""
    return math.prod(keys.shape("v.blk.0.ffn_up.weight")) // keys.count("vision.embedding_length")


def _qwen2(keys: Keys) -> Mapping[str, Any]:
    width = keys.count("vision.embedding_length")
    return {
        "vision_config.embed_dim": width,
        "vision_config.hidden_size": keys.shape("mm.2.weight")[0],
        "vision_config.mlp_ratio": _inner(keys) // width,
        "vision_config.spatial_merge_size": merge(keys, 2),
    }


QWEN2 = Tower(
    "qwen2vl_merger",
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    "qwen2_vl_vision",
    {"qwen2": "qwen2_vl_text"},
    {"model.visual.merger.ln_q": "v.post_ln", "model.visual.merger.mlp.0": "mm.0", "model.visual.merger.mlp.2": "mm.2"},
    {
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv": ("attn_q", "attn_k", "attn_v"),
        "attn.proj": "attn_out",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    "model.visual.blocks",
    ("mm.2.weight", 0),
    extra=frozenset(("v.position_embd.weight",)),  # older files have zeros, which nothing reads
    swapped=True,
    pairs={"model.visual.patch_embed.proj.weight": ("v.patch_embd.weight", "v.patch_embd.weight.1")},
    sizes=_QWEN_SIZES,
    epsilon="",
    activations={"": "quick_gelu"},
    further=_qwen2,
    sections=True,
    tokens=_QWEN_TOKENS,
    processor="Qwen2VLProcessor",
    images="Qwen2VLImageProcessor",
    pixels=partial(_area, 3136, 12845056),
)


def _qwen25(keys: Keys) -> Mapping[str, Any]:
    return _windowed(keys, keys.count("vision.n_wa_pattern"))


def _windowed(keys: Keys, every: int) -> Mapping[str, Any]:
    """every: one of so many blocks has attention over the whole image, and the others have windows."""
    return {
        "vision_config.intermediate_size": _inner(keys),
        "vision_config.out_hidden_size": keys.shape("mm.2.weight")[0],
        "vision_config.spatial_merge_size": merge(keys, 2),
        "vision_config.fullatt_block_indexes": list(range(every - 1, keys.count("vision.block_count"), every)),
    }


QWEN25 = replace(
    QWEN2,
    projector="qwen2.5vl_merger",
    model_type="qwen2_5_vl",
    cls="Qwen2_5_VLForConditionalGeneration",
    vision_type="qwen2_5_vl_vision",
    texts={"qwen2": "qwen2_5_vl_text"},
    block={
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv": ("attn_q", "attn_k", "attn_v"),
        "attn.proj": "attn_out",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    sizes={**_QWEN_SIZES, "hidden_size": "embedding_length"},
    activations={"use_silu": "silu"},
    fixed={"vision_config.window_size": 112, "vision_config.tokens_per_second": 2},
    further=_qwen25,
    processor="Qwen2_5_VLProcessor",
)


def _glm(keys: Keys) -> Mapping[str, Any]:
    return {
        "vision_config.attention_bias": "v.blk.0.attn_qkv.bias" in keys.file.entries,
        "vision_config.out_hidden_size": keys.shape("mm.model.fc.weight")[0],
        "vision_config.spatial_merge_size": keys.shape("mm.patch_merger.weight", 4)[-1],
    }


GLM = replace(
    QWEN25,
    projector="glm4v",
    model_type="glm4v_moe",
    cls="Glm4vMoeForConditionalGeneration",
    vision_type="glm4v_moe_vision",
    texts={"glm4_moe": "glm4v_moe_text"},
    model={
        "model.visual.patch_embed.proj": "v.patch_embd",
        "model.visual.post_conv_layernorm": "v.norm_embd",
        "model.visual.embeddings.position_embedding": "v.position_embd",
        "model.visual.post_layernorm": "v.post_ln",
        "model.visual.downsample": "mm.patch_merger",
        "model.visual.merger.proj": "mm.model.fc",
        "model.visual.merger.post_projection_norm": "mm.post_norm",
        "model.visual.merger.gate_proj": "mm.gate",
        "model.visual.merger.up_proj": "mm.up",
        "model.visual.merger.down_proj": "mm.down",
    },
    block={**QWEN25.block, "attn.qkv": "attn_qkv"},
    output=("mm.down.weight", 0),
    extra=frozenset(),
    swapped=False,
    sizes={
        **_QWEN_SIZES,
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "image_size": "image_size",
    },
    epsilon="rms_norm_eps",
    fixed={},
    further=_glm,
    tokens={
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    processor="Glm4vProcessor",
    images="Glm4vImageProcessor",
    likewise=frozenset(("Glm46VImageProcessor",)),
    named={"image_token": "<|image|>", "video_token": "<|video|>"},
    pixels=partial(_area, 12544, 9633792),
)


GLM_DENSE = replace(
    GLM,
    model_type="glm4v",
    cls="Glm4vForConditionalGeneration",
    vision_type="glm4v_vision",
    texts={"glm4": "glm4v_text"},
    sections=True,
)
GLM_OCR = replace(
    GLM_DENSE,
    model_type="glm_ocr",
    cls="GlmOcrForConditionalGeneration",
    vision_type="glm_ocr_vision",
    texts={"glm4": "glm_ocr_text"},
    model={
        name: ours
        for name, ours in GLM.model.items()
        if not name.endswith((".embeddings.position_embedding", ".post_conv_layernorm"))
    },
    block={**GLM.block, "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm"},
    when="v.blk.0.attn_q_norm.weight",
)


def _exaone(keys: Keys) -> Mapping[str, Any]:
    heads = keys.count("vision.attention.head_count")
    return {
        **_windowed(keys, keys.whole("vision.n_wa_pattern") or 1),  # without the key, no block has windows (clip.cpp)
        "vision_config.num_key_value_heads": keys.count("vision.attention.head_count_kv", heads),
        "vision_config.window_size": keys.count("vision.window_size", 112),
    }


EXAONE = replace(
    QWEN25,
    projector="exaone4_5",
    model_type="exaone4_5",
    cls="Exaone4_5_ForConditionalGeneration",
    vision_type="exaone4_5_vision",
    texts={"exaone4": "exaone4"},
    block={**QWEN25.block, "attn.qkv": "attn_qkv"},
    fixed={},
    further=_exaone,
    sections=False,
    tokens={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    processor="Exaone4_5_Processor",
    marks=("<vision>", "</vision>"),
    named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
)


def _qwen35(keys: Keys) -> Mapping[str, Any]:
    return {
        "vision_config.out_hidden_size": keys.shape("mm.2.weight")[0],
        "vision_config.spatial_merge_size": merge(keys, 2),
        "vision_config.num_position_embeddings": keys.shape("v.position_embd.weight")[0],
    }


def _qwen3(keys: Keys) -> Mapping[str, Any]:
    marked = keys.flags("vision.is_deepstack_layers", keys.count("vision.block_count"))
    return {**_qwen35(keys), "vision_config.deepstack_visual_indexes": [i for i, each in enumerate(marked) if each]}


QWEN3 = replace(
    QWEN25,
    projector="qwen3vl_merger",
    model_type="qwen3_vl",
    cls="Qwen3VLForConditionalGeneration",
    vision_type="qwen3_vl_vision",
    texts={"qwen3": "qwen3_vl_text"},
    model={
        "model.visual.patch_embed.proj": "v.patch_embd",
        "model.visual.pos_embed": "v.position_embd",
        "model.visual.merger.norm": "v.post_ln",
        "model.visual.merger.linear_fc1": "mm.0",
        "model.visual.merger.linear_fc2": "mm.2",
    },
    block={
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv": "attn_qkv",
        "attn.proj": "attn_out",
        "mlp.linear_fc1": "ffn_up",
        "mlp.linear_fc2": "ffn_down",
    },
    extra=frozenset(),
    swapped=False,
    beside={
        "model.visual.deepstack_merger_list.*.norm": "norm",
        "model.visual.deepstack_merger_list.*.linear_fc1": "fc1",
        "model.visual.deepstack_merger_list.*.linear_fc2": "fc2",
    },
    sizes={
        **_QWEN_SIZES,
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
    },
    activations={"use_gelu": GELU},
    fixed={},
    further=_qwen3,
    processor="Qwen3VLProcessor",
    pixels=partial(_area, 65536, 16777216),
)
QWEN3_EXPERTS = replace(
    QWEN3,
    model_type="qwen3_vl_moe",
    cls="Qwen3VLMoeForConditionalGeneration",
    vision_type="qwen3_vl_moe_vision",
    texts={"qwen3_moe": "qwen3_vl_moe_text"},
)
QWEN35 = replace(
    QWEN3,
    model_type="qwen3_5",
    cls="Qwen3_5ForConditionalGeneration",
    vision_type="qwen3_5_vision",
    texts={"qwen3_5_text": "qwen3_5_text"},
    beside={},
    further=_qwen35,
)
QWEN35_EXPERTS = replace(
    QWEN35,
    model_type="qwen3_5_moe",
    cls="Qwen3_5MoeForConditionalGeneration",
    vision_type="qwen3_5_moe_vision",
    texts={"qwen3_5_moe_text": "qwen3_5_moe_text"},
)
