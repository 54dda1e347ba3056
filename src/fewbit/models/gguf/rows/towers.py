"""Vision towers: Gemma 3, Pixtral, LLaVA, Idefics 3 and InternVL, and the list of all.

Source: conversion/ and tools/mtmd/clip.cpp of llama.cpp, and the configs of the published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fewbit.errors import FormatError
from fewbit.models.gguf.metadata import Keys
from fewbit.models.gguf.rows.granite_tower import GRANITE
from fewbit.models.gguf.rows.later_towers import GEMMA4, GEMMA4_UNIFIED, KIMI, LFM2, LLAMA4, LLAMA4_OLDER, MINICPM
from fewbit.models.gguf.rows.qwen_towers import (
    EXAONE,
    GLM,
    GLM_DENSE,
    GLM_OCR,
    QWEN2,
    QWEN3,
    QWEN3_EXPERTS,
    QWEN25,
    QWEN35,
    QWEN35_EXPERTS,
    merge,
)
from fewbit.models.gguf.rows.shared import GELU
from fewbit.models.gguf.tower import BLOCK, Tower, merged, side


def _square(keys: Keys) -> dict[str, int]:
    return dict.fromkeys(("height", "width"), keys.count("vision.image_size"))


def _four(entry: str, keys: Keys) -> Mapping[str, Any]:
    return {entry: merged(keys, 4)}


def _squares(keys: Keys) -> Mapping[str, Any]:
    return {"size": _square(keys)}


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
    further=partial(_four, "mm_tokens_per_image"),
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
    pixels=_squares,
    processing=partial(_four, "image_seq_length"),
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


def _merging(keys: Keys) -> Mapping[str, Any]:
    return {"patch_size": keys.count("vision.patch_size"), "spatial_merge_size": merge(keys, 1)}


def _mistral3(keys: Keys) -> Mapping[str, Any]:
    return {**_pixtral(keys), "spatial_merge_size": merge(keys, 1)}


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
    processing=_merging,
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
    further=_mistral3,
)


def _lighton(keys: Keys) -> Mapping[str, Any]:
    """Only whole squares of patches become vectors, so images have sides that are multiples of these."""
    whole = keys.count("vision.patch_size") * merge(keys, 1)
    size = {"longest_edge": keys.count("vision.image_size")}
    return {"size": size, "patch_size": {"height": whole, "width": whole}}


LIGHTON = replace(
    MISTRAL3,
    projector="lightonocr",
    model_type="lighton_ocr",
    cls="LightOnOcrForConditionalGeneration",
    texts={"qwen3": "qwen3"},
    model={
        "model.vision_encoder.patch_conv": "v.patch_embd",
        "model.vision_encoder.ln_pre": "v.pre_ln",
        "model.vision_projection.norm": "mm.input_norm",
        "model.vision_projection.patch_merger.merging_layer": "mm.patch_merger",
        "model.vision_projection.linear_1": "mm.1",
        "model.vision_projection.linear_2": "mm.2",
    },
    layers="model.vision_encoder.transformer.layers",
    extra=frozenset(),
    when="",
    fixed={},
    tokens={"image_token_id": "<|image_pad|>"},
    processor="LightOnOcrProcessor",
    named={
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    },
    pixels=_lighton,
)


_TILES = ("mm_patch_merge_type", "image_grid_pinpoints")


def _llava(keys: Keys) -> Mapping[str, Any]:
    newer = [f"clip.vision.{key}" for key in _TILES if str(keys.get(f"vision.{key}", "flat")) != "flat"]
    if newer := newer or [name for name in ("model.image_newline",) if name in keys.file.entries]:
        raise FormatError(
            f"{keys.file.path} has {newer[0]}: it cuts images into tiles (LLaVA 1.6), and fewbit reads LLaVA 1.5",
            "Without `mmproj`, the language model runs on text.",
        )
    layers, key = keys.count("vision.block_count"), "vision.feature_layer"
    if keys.get(key) is not None and (found := keys.wholes(key, 1)) != [layers]:
        raise keys.wrong(f"clip.{key} is {found}; only the last of {layers} blocks is read")
    return {"image_seq_length": side(keys) ** 2}


def _cropped(keys: Keys) -> Mapping[str, Any]:
    return {"size": {"shortest_edge": keys.count("vision.image_size")}, "crop_size": _square(keys)}


def _llava_text(keys: Keys) -> Mapping[str, Any]:
    return {
        "patch_size": keys.count("vision.patch_size"),
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }


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
    pixels=_cropped,
    processing=_llava_text,
)


def _scaled(keys: Keys) -> Mapping[str, Any]:
    merged(keys)  # refuses a factor that does not fit
    return {"scale_factor": keys.count("vision.projector.scale_factor")}


def _limits(keys: Keys) -> Mapping[str, Any]:
    size = keys.count("vision.image_size")
    largest = keys.count("vision.preproc_image_size", size)
    return {"size": {"longest_edge": largest}, "max_image_size": {"longest_edge": size}}


def _idefics_text(keys: Keys) -> Mapping[str, Any]:
    return {"image_seq_len": merged(keys)}


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
    further=_scaled,
    tokens={"image_token_id": "<image>"},
    processor="Idefics3Processor",
    images="Idefics3ImageProcessor",
    likewise=frozenset(("SmolVLMImageProcessor",)),
    pixels=_limits,
    processing=_idefics_text,
)

_INTERN = "model.vision_tower"


def _internvl(keys: Keys) -> Mapping[str, Any]:
    entries = keys.file.entries
    size, patch = keys.count("vision.image_size"), keys.count("vision.patch_size")
    return {
        "downsample_ratio": 1 / keys.count("vision.projector.scale_factor"),
        "image_seq_length": merged(keys),
        "vision_config.image_size": [size, size],
        "vision_config.patch_size": [patch, patch],
        "vision_config.attention_bias": "v.blk.0.attn_q.bias" in entries,
        "vision_config.use_qk_norm": "v.blk.0.attn_q_norm.weight" in entries,
        "vision_config.norm_type": "layer_norm" if "v.blk.0.ln1.bias" in entries else "rms_norm",
    }


def _tiles(keys: Keys) -> Mapping[str, Any]:
    return {
        "size": _square(keys),
        "min_patches": keys.count("vision.preproc_min_tiles", 1),
        "max_patches": keys.count("vision.preproc_max_tiles", 12),
    }


def _internvl_text(keys: Keys) -> Mapping[str, Any]:
    return {"image_seq_length": merged(keys)}


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
    beyond="<video>",
    processor="InternVLProcessor",
    images="GotOcr2ImageProcessor",
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    pixels=_tiles,
    processing=_internvl_text,
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
    GEMMA4,
    GEMMA4_UNIFIED,
    LLAMA4,
    LLAMA4_OLDER,
    LFM2,
    MINICPM,
    KIMI,
    GRANITE,
    LIGHTON,
    EXAONE,
    GLM,
    GLM_DENSE,
    GLM_OCR,
)
