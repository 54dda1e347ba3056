"""Vision towers: Gemma 3, Qwen-VL, Qwen 3.5, Pixtral, LLaVA, Idefics 3 and InternVL.

Source: conversion/ and tools/mtmd/clip.cpp of llama.cpp, and the configs of the published models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fewbit.models.gguf.metadata import Keys
from fewbit.models.gguf.rows.shared import GELU
from fewbit.models.gguf.tower import BLOCK, Tower


def _side(keys: Keys) -> int:
    """Patches in a row of an image of the usual size."""
    return keys.ratio("vision.image_size", "vision.patch_size")


def _square(keys: Keys) -> dict[str, int]:
    return dict.fromkeys(("height", "width"), keys.count("vision.image_size"))


def _merged(keys: Keys, usual: int | None = None) -> int:
    """Vectors of an image of the usual size, of which one is made of several patches."""
    return (_side(keys) // keys.count("vision.projector.scale_factor", usual)) ** 2


_SIGLIP = "model.vision_tower"
GEMMA3 = Tower(
    "gemma3",
    "gemma3",
    "Gemma3ForConditionalGeneration",
    "siglip_vision_model",
    {"gemma3_text": "gemma3_text"},
    {
        f"{_SIGLIP}.embeddings.patch_embedding": "v.patch_embd",
        f"{_SIGLIP}.embeddings.position_embedding": "v.position_embd",
        f"{_SIGLIP}.post_layernorm": "v.post_ln",
        "model.multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
    },
    BLOCK,
    f"{_SIGLIP}.encoder.layers",
    ("mm.input_projection.weight", 1),
    parameters={"model.multi_modal_projector.mm_input_projection_weight": "mm.input_projection.weight"},
    swapped=True,
    shifted=frozenset(("mm.soft_emb_norm",)),
    activations={"use_gelu": GELU},
    fixed={"vision_config.vision_use_head": False},
    further=lambda keys: {"mm_tokens_per_image": _merged(keys, 4)},
    tokens={
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
        "image_token_index": "<image_soft_token>",
    },
    beyond="<image_soft_token>",
    processor="Gemma3Processor",
    images="Gemma3ImageProcessor",
    named={
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    pixels=lambda keys: {"size": _square(keys)},
    processing=lambda keys: {"image_seq_length": _merged(keys, 4)},
)

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


def _merge(keys: Keys, usual: int) -> int:
    return keys.count("vision.spatial_merge_size", usual)


def _area(least: int, most: int) -> Any:
    """Settings of Qwen's images. least, most: pixels of an image in published models, as a file has no key for them."""

    def settings(keys: Keys) -> Mapping[str, Any]:
        limits = (keys.count("vision.image_min_pixels", least), keys.count("vision.image_max_pixels", most))
        return {
            "patch_size": keys.count("vision.patch_size"),
            "merge_size": _merge(keys, 2),
            "size": dict(zip(("shortest_edge", "longest_edge"), limits, strict=True)),
        }

    return settings


def _inner(keys: Keys) -> int:
    """The inner width of MLPs. Older files have 0 as their feed_forward_length."""
    return math.prod(keys.shape("v.blk.0.ffn_up.weight")) // keys.count("vision.embedding_length")


def _qwen2(keys: Keys) -> Mapping[str, Any]:
    width = keys.count("vision.embedding_length")
    return {
        "vision_config.embed_dim": width,
        "vision_config.hidden_size": keys.shape("mm.2.weight")[0],
        "vision_config.mlp_ratio": _inner(keys) // width,
        "vision_config.spatial_merge_size": _merge(keys, 2),
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
    pixels=_area(3136, 12845056),
)


def _qwen25(keys: Keys) -> Mapping[str, Any]:
    every = keys.count("vision.n_wa_pattern")
    return {
        "vision_config.intermediate_size": _inner(keys),
        "vision_config.out_hidden_size": keys.shape("mm.2.weight")[0],
        "vision_config.spatial_merge_size": _merge(keys, 2),
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


def _qwen35(keys: Keys) -> Mapping[str, Any]:
    return {
        "vision_config.out_hidden_size": keys.shape("mm.2.weight")[0],
        "vision_config.spatial_merge_size": _merge(keys, 2),
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
    pixels=_area(65536, 16777216),
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

_LLAMAS = {"llama": "llama", "mistral": "mistral", "ministral3": "ministral3"}


def _pixtral(keys: Keys) -> Mapping[str, Any]:
    return {
        "multimodal_projector_bias": "mm.1.bias" in keys.file.entries,
        "vision_config.image_size": keys.count("vision.image_size"),
    }


def _longest(keys: Keys) -> Mapping[str, Any]:
    patch = keys.count("vision.patch_size")
    return {"size": {"longest_edge": keys.count("vision.image_size")}, "patch_size": {"height": patch, "width": patch}}


PIXTRAL = Tower(
    "pixtral",
    "llava",
    "LlavaForConditionalGeneration",
    "pixtral",
    _LLAMAS,
    {
        "model.vision_tower.patch_conv": "v.patch_embd",
        "model.vision_tower.ln_pre": "v.pre_ln",
        "model.multi_modal_projector.linear_1": "mm.1",
        "model.multi_modal_projector.linear_2": "mm.2",
    },
    {
        "attention_norm": "ln1",
        "ffn_norm": "ln2",
        "attention.q_proj": "attn_q",
        "attention.k_proj": "attn_k",
        "attention.v_proj": "attn_v",
        "attention.o_proj": "attn_out",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
    "model.vision_tower.transformer.layers",
    ("mm.2.weight", 0),
    extra=frozenset(("v.token_embd.img_break",)),  # a row of the language model's embedding
    permuted=True,
    epsilon="",
    activations={"use_gelu": "gelu", "use_silu": "silu"},
    fixed={
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
    },
    further=_pixtral,
    tokens={"image_token_index": "[IMG]"},
    processor="PixtralProcessor",
    images="PixtralImageProcessor",
    named={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    pixels=_longest,
    processing=lambda keys: {
        "patch_size": keys.count("vision.patch_size"),
        "spatial_merge_size": _merge(keys, 1),
    },
)
MISTRAL3 = replace(
    PIXTRAL,
    model_type="mistral3",
    cls="Mistral3ForConditionalGeneration",
    model={
        **PIXTRAL.model,
        "model.multi_modal_projector.norm": "mm.input_norm",
        "model.multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger",
    },
    when="mm.patch_merger.weight",
    fixed={"vision_feature_layer": -1, "projector_hidden_act": "gelu"},
    further=lambda keys: {**_pixtral(keys), "spatial_merge_size": _merge(keys, 1)},
)


def _llava(keys: Keys) -> Mapping[str, Any]:
    layers, key = keys.count("vision.block_count"), "vision.feature_layer"
    if keys.get(key) is not None and (found := keys.wholes(key, 1)) != [layers]:
        raise keys.wrong(f"clip.{key} is {found}; only the last of {layers} blocks is read")
    return {"image_seq_length": _side(keys) ** 2}


LLAVA = Tower(
    "mlp",
    "llava",
    "LlavaForConditionalGeneration",
    "clip_vision_model",
    {**_LLAMAS, "qwen2": "qwen2", "phi3": "phi3"},
    {
        f"{_SIGLIP}.embeddings.patch_embedding": "v.patch_embd",
        f"{_SIGLIP}.embeddings.position_embedding": "v.position_embd",
        f"{_SIGLIP}.pre_layrnorm": "v.pre_ln",
        "model.multi_modal_projector.linear_1": "mm.0",
        "model.multi_modal_projector.linear_2": "mm.2",
    },
    BLOCK,
    f"{_SIGLIP}.encoder.layers",
    ("mm.2.weight", 0),
    parameters={f"{_SIGLIP}.embeddings.class_embedding": "v.class_embd"},
    unused=frozenset((f"{_SIGLIP}.post_layernorm",)),
    swapped=True,  # so are the files of llama.cpp's script for CLIP
    activations={"": "quick_gelu", "use_gelu": "gelu"},
    fixed={
        "vision_feature_layer": -1,  # a file lacks the last block
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    },
    further=_llava,
    tokens={"image_token_index": "<image>"},
    processor="LlavaProcessor",
    images="CLIPImageProcessor",
    named={"image_token": "<image>"},
    pixels=lambda keys: {
        "size": {"shortest_edge": keys.count("vision.image_size")},
        "crop_size": _square(keys),
    },
    processing=lambda keys: {
        "patch_size": keys.count("vision.patch_size"),
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
)

IDEFICS3 = Tower(
    "idefics3",
    "idefics3",
    "Idefics3ForConditionalGeneration",
    "idefics3_vision",
    _LLAMAS,
    {
        "model.vision_model.embeddings.patch_embedding": "v.patch_embd",
        "model.vision_model.embeddings.position_embedding": "v.position_embd",
        "model.vision_model.post_layernorm": "v.post_ln",
        "model.connector.modality_projection.proj": "mm.model.fc",
    },
    BLOCK,
    "model.vision_model.encoder.layers",
    ("mm.model.fc.weight", 0),
    swapped=True,
    language="model.text_model",
    activations={"use_gelu": GELU},
    further=lambda keys: {"scale_factor": keys.count("vision.projector.scale_factor")},
    tokens={"image_token_id": "<image>"},
    processor="Idefics3Processor",
    images="Idefics3ImageProcessor",
    pixels=lambda keys: {
        "size": {"longest_edge": keys.count("vision.preproc_image_size", keys.count("vision.image_size"))},
        "max_image_size": {"longest_edge": keys.count("vision.image_size")},
    },
    processing=lambda keys: {"image_seq_len": _merged(keys)},
)

_INTERN = "model.vision_tower"


def _internvl(keys: Keys) -> Mapping[str, Any]:
    entries = keys.file.entries
    size, patch = keys.count("vision.image_size"), keys.count("vision.patch_size")
    return {
        "downsample_ratio": 1 / keys.count("vision.projector.scale_factor"),
        "image_seq_length": _merged(keys),
        "vision_config.image_size": [size, size],
        "vision_config.patch_size": [patch, patch],
        "vision_config.attention_bias": "v.blk.0.attn_q.bias" in entries,
        "vision_config.use_qk_norm": "v.blk.0.attn_q_norm.weight" in entries,
        "vision_config.norm_type": "layer_norm" if "v.blk.0.ln1.bias" in entries else "rms_norm",
    }


INTERNVL = Tower(
    "internvl",
    "internvl",
    "InternVLForConditionalGeneration",
    "internvl_vision",
    {**_LLAMAS, **{kind: kind for kind in ("qwen2", "qwen3", "qwen3_moe", "gpt_oss")}},
    {
        f"{_INTERN}.embeddings.patch_embeddings.projection": "v.patch_embd",
        "model.multi_modal_projector.layer_norm": "mm.model.mlp.0",
        "model.multi_modal_projector.linear_1": "mm.model.mlp.1",
        "model.multi_modal_projector.linear_2": "mm.model.mlp.3",
    },
    {
        "attention.q_proj": "attn_q",
        "attention.k_proj": "attn_k",
        "attention.v_proj": "attn_v",
        "attention.projection_layer": "attn_out",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "layernorm_before": "ln1",
        "layernorm_after": "ln2",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    f"{_INTERN}.encoder.layer",
    ("mm.model.mlp.3.weight", 0),
    parameters={
        f"{_INTERN}.embeddings.cls_token": "v.class_embd",
        f"{_INTERN}.embeddings.position_embeddings": "v.position_embd.weight",
    },
    block_parameters={"lambda_1": "ls1.weight", "lambda_2": "ls2.weight"},
    activations={"use_gelu": "gelu", "use_silu": "silu"},
    fixed={
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "vision_config.use_absolute_position_embeddings": True,
        "vision_config.use_mask_token": False,
        "vision_config.use_mean_pooling": True,
    },
    further=_internvl,
    tokens={"image_token_id": "<IMG_CONTEXT>"},
    processor="InternVLProcessor",
    images="GotOcr2ImageProcessor",
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    pixels=lambda keys: {
        "size": _square(keys),
        "min_patches": keys.count("vision.preproc_min_tiles", 1),
        "max_patches": keys.count("vision.preproc_max_tiles", 12),
    },
    processing=lambda keys: {"image_seq_length": _merged(keys)},
)

ROWS = (
    GEMMA3,
    QWEN2,
    QWEN25,
    QWEN3,
    QWEN3_EXPERTS,
    QWEN35,
    QWEN35_EXPERTS,
    MISTRAL3,
    PIXTRAL,
    LLAVA,
    IDEFICS3,
    INTERNVL,
)
