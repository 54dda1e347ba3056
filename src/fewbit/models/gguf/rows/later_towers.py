"""Vision towers of Gemma 4, Llama 4, LFM2-VL, MiniCPM-V 4.6 and Kimi K2.5.

Gemma 4 12B ("unified") has no encoder: a patch becomes a vector.

Source: conversion/ and tools/mtmd/ of llama.cpp, and the configs of the published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from fewbit.errors import FormatError
from fewbit.models.gguf.metadata import Keys
from fewbit.models.gguf.rows.shared import GELU
from fewbit.models.gguf.tower import BLOCK, SIZES, Tower, merged

_CAUSAL = (1536, 2560)  # widths of language models that do not see an image at once: E2B and E4B (mtmd.cpp)


def _pooled(keys: Keys) -> int:
    """Patches in a row, of which one vector is made."""
    return keys.count("vision.projector.scale_factor", 3)


def _gemma4(keys: Keys) -> Mapping[str, Any]:
    entries, heads = keys.file.entries, keys.count("vision.attention.head_count")
    rows = [keys.shape(f"v.blk.0.attn_{each}.weight")[0] for each in "qk"]
    if rows[0] % heads or rows[1] % (width := rows[0] // heads):
        raise keys.wrong(f"clip.vision.attention.head_count is {heads}, and v.blk.0.attn_q.weight has {rows[0]} rows")
    causal = keys.shape("mm.input_projection.weight")[0] in _CAUSAL
    return {
        "text_config.use_bidirectional_attention": None if causal else "vision",
        "vision_config.head_dim": width,
        "vision_config.num_key_value_heads": rows[1] // width,
        "vision_config.pooling_kernel_size": _pooled(keys),
        "vision_config.position_embedding_size": keys.shape("v.position_embd.weight", 3)[1],
        "vision_config.standardize": "v.std_bias" in entries,
        "vision_config.use_clipped_linears": "v.blk.0.attn_q.input_max" in entries,
    }


def _patches(keys: Keys) -> Mapping[str, Any]:
    return {"patch_size": keys.count("vision.patch_size"), "pooling_kernel_size": _pooled(keys)}


_TOWER = "model.vision_tower"
_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA4 = Tower(
    "gemma4v",
    "gemma4",
    "Gemma4ForConditionalGeneration",
    "gemma4_vision",
    {"gemma4_text": "gemma4_text"},
    {
        f"{_TOWER}.patch_embedder.input_proj": "v.patch_embd",
        "model.embed_vision.embedding_projection": "mm.input_projection",
    },
    {
        **{f"{theirs}.linear": ours for theirs, ours in _LINEARS.items()},
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "attn_post_norm",
        "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ffn_post_norm",
    },
    f"{_TOWER}.encoder.layers",
    ("mm.input_projection.weight", 0),
    parameters={
        f"{_TOWER}.patch_embedder.position_embedding_table": "v.position_embd.weight",
        f"{_TOWER}.std_bias": "v.std_bias",
        f"{_TOWER}.std_scale": "v.std_scale",
    },
    block_parameters={
        f"{theirs}.{end}": f"{ours}.{end}"
        for theirs, ours in _LINEARS.items()
        for end in ("input_min", "input_max", "output_min", "output_max")
    },
    pixels_last={"v.patch_embd": ("patch_size", "kernel")},
    sound=True,
    sizes={theirs: ours for theirs, ours in SIZES.items() if theirs != "image_size"},
    epsilon="rms_norm_eps",
    activation="hidden_activation",
    activations={"": GELU},
    fixed={"audio_config": None},
    further=_gemma4,
    tokens={
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "boa_token_id": "<|audio>",
        "eoa_token_index": "<audio|>",
        "audio_token_id": "<|audio|>",
    },
    processor="Gemma4Processor",
    images="Gemma4ImageProcessor",
    named={
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
    },
    pixels=_patches,
)


def _unified(keys: Keys) -> Mapping[str, Any]:
    return {
        "text_config.use_bidirectional_attention": "vision",
        "vision_config.pooling_kernel_size": _pooled(keys),
        "vision_config.mm_embed_dim": keys.shape("v.patch_embd.weight")[0],
        "vision_config.mm_posemb_size": keys.shape("v.position_embd.weight", 3)[1],
        "vision_config.output_proj_dims": keys.shape("mm.input_projection.weight")[1],
    }


_EMBEDDER = "model.embed_vision"
GEMMA4_UNIFIED = replace(
    GEMMA4,
    projector="gemma4uv",
    model_type="gemma4_unified",
    cls="Gemma4UnifiedForConditionalGeneration",
    vision_type="gemma4_unified_vision",
    texts={"gemma4_text": "gemma4_unified_text"},
    model={
        f"{_EMBEDDER}.patch_ln1": "v.patch_norm.1",
        f"{_EMBEDDER}.patch_dense": "v.patch_embd",
        f"{_EMBEDDER}.patch_ln2": "v.patch_norm.2",
        f"{_EMBEDDER}.pos_norm": "v.patch_norm.3",
        f"{_EMBEDDER}.multimodal_embedder.embedding_projection": "mm.input_projection",
    },
    block={},
    parameters={f"{_EMBEDDER}.pos_embedding": "v.position_embd.weight"},
    block_parameters={},
    exchanged=frozenset((f"{_EMBEDDER}.pos_embedding",)),
    pixels_last={
        "v.patch_embd": ("model_patch_size", "matrix"),
        "v.patch_norm.1": ("model_patch_size", "vector"),
    },
    sizes={"patch_size": "patch_size"},
    activation="",
    further=_unified,
    processor="Gemma4UnifiedProcessor",
    images="Gemma4UnifiedImageProcessor",
)


def _llama4(keys: Keys) -> Mapping[str, Any]:
    merged(keys)  # refuses a factor that does not fit
    widths = keys.shape("mm.model.mlp.1.weight")[0], keys.shape("mm.model.mlp.2.weight")[0]
    return {
        "vision_config.pixel_shuffle_ratio": 1 / keys.count("vision.projector.scale_factor"),
        "vision_config.projector_input_dim": widths[0],
        "vision_config.projector_output_dim": widths[1],
        "vision_config.vision_output_dim": keys.shape("mm.model.fc.weight")[1],
    }


def _tiles(keys: Keys) -> Mapping[str, Any]:
    return {"size": dict.fromkeys(("height", "width"), keys.count("vision.image_size"))}


def _shuffled(keys: Keys) -> Mapping[str, Any]:
    ratio = 1 / keys.count("vision.projector.scale_factor")
    return {"patch_size": keys.count("vision.patch_size"), "pixel_shuffle_ratio": ratio}


LLAMA4 = Tower(
    "llama4",
    "llama4",
    "Llama4ForConditionalGeneration",
    "llama4_vision_model",
    {"llama4_text": "llama4_text"},
    {
        "vision_model.patch_embedding.linear": "v.patch_embd",
        "vision_model.layernorm_pre": "v.pre_ln",
        "vision_model.layernorm_post": "v.post_ln",
        "vision_model.vision_adapter.mlp.fc1": "mm.model.mlp.1",
        "vision_model.vision_adapter.mlp.fc2": "mm.model.mlp.2",
        "multi_modal_projector.linear_1": "mm.model.fc",
    },
    {
        **{theirs: ours for theirs, ours in BLOCK.items() if not theirs.startswith(("self_attn.out", "layer_norm"))},
        "self_attn.o_proj": "attn_out",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "attn_post_norm",
    },
    "vision_model.model.layers",
    ("mm.model.fc.weight", 0),
    parameters={
        "vision_model.class_embedding": "v.class_embd",
        "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    },
    language="language_model.model",
    head="language_model.lm_head",
    epsilon="norm_eps",
    activations={"use_gelu": "gelu"},
    further=_llama4,
    tokens={
        "boi_token_index": "<|image_start|>",
        "eoi_token_index": "<|image_end|>",
        "image_token_index": "<|patch|>",
    },
    processor="Llama4Processor",
    images="Llama4ImageProcessor",
    named={
        "fake_image_token": "<|image|>",
        "tile_x_separator_token": "<|tile_x_separator|>",
        "tile_y_separator_token": "<|tile_y_separator|>",
    },
    pixels=_tiles,
    processing=_shuffled,
)
# Older versions of the converter, and so the published files, have another name for a norm
LLAMA4_OLDER = replace(
    LLAMA4,
    block={**LLAMA4.block, "post_attention_layernorm": "ln2"},
    when="v.blk.0.ln2.weight",
)


def _lfm2(keys: Keys) -> Mapping[str, Any]:
    entries = keys.file.entries
    return {
        "downsample_factor": keys.count("vision.projector.scale_factor", 2),
        "projector_hidden_size": keys.shape("mm.1.weight")[0],
        "projector_bias": "mm.1.bias" in entries,
        "projector_use_layernorm": "mm.input_norm.weight" in entries,
        "vision_config.num_patches": keys.shape("v.position_embd.weight")[0],
    }


def _unshuffled(keys: Keys) -> Mapping[str, Any]:
    factor = keys.count("vision.projector.scale_factor", 2)
    return {"encoder_patch_size": keys.count("vision.patch_size"), "downsample_factor": factor}


LFM2 = Tower(
    "lfm2",
    "lfm2_vl",
    "Lfm2VlForConditionalGeneration",
    "siglip2_vision_model",
    {"lfm2": "lfm2", "lfm2_moe": "lfm2_moe"},
    {
        f"{_TOWER}.embeddings.patch_embedding": "v.patch_embd",
        f"{_TOWER}.embeddings.position_embedding": "v.position_embd",
        f"{_TOWER}.post_layernorm": "v.post_ln",
        "model.multi_modal_projector.layer_norm": "mm.input_norm",
        "model.multi_modal_projector.linear_1": "mm.1",
        "model.multi_modal_projector.linear_2": "mm.2",
    },
    BLOCK,
    f"{_TOWER}.encoder.layers",
    ("mm.2.weight", 0),
    pixels_last={"v.patch_embd": ("patch_size", "kernel")},
    sizes={theirs: ours for theirs, ours in SIZES.items() if theirs != "image_size"},
    activations={"use_gelu": GELU},
    fixed={"projector_hidden_act": "gelu", "vision_config.vision_use_head": False},
    further=_lfm2,
    tokens={"image_token_id": "<image>"},
    processor="Lfm2VlProcessor",
    images="Lfm2VlImageProcessor",
    named={
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    },
    pixels=_unshuffled,
)


def _minicpm(keys: Keys) -> Mapping[str, Any]:
    if (factor := keys.count("vision.projector.scale_factor", 4)) != 4:
        raise FormatError(
            f"{keys.file.path}: clip.vision.projector.scale_factor is {factor}; fewbit reads MiniCPM-V 4.6 with 4, of "
            'which 16 patches make one vector (downsample_mode "16x")',
            "Without `mmproj`, the language model runs on text.",
        )
    layers, places = keys.wholes("vision.wa_layer_indexes", 1), keys.shape("v.position_embd.weight")[0]
    if len(layers) > 1 or layers[0] >= keys.count("vision.block_count"):
        raise keys.wrong(f"clip.vision.wa_layer_indexes is {layers}, not the number of one block")
    if (side := isqrt(places)) ** 2 != places:
        raise keys.wrong(f"v.position_embd.weight has {places} positions, which are no square")
    return {"insert_layer_id": layers[0], "vision_config.image_size": side * keys.count("vision.patch_size")}


def _slices(keys: Keys) -> Mapping[str, Any]:
    return {"scale_resolution": keys.count("vision.image_size"), "patch_size": keys.count("vision.patch_size")}


_MERGER = f"{_TOWER}.vit_merger"
MINICPM = Tower(
    "minicpmv4_6",
    "minicpmv4_6",
    "MiniCPMV4_6ForConditionalGeneration",
    "minicpmv4_6_vision",
    {"qwen3_5_text": "qwen3_5_text"},
    {
        f"{_TOWER}.embeddings.patch_embedding": "v.patch_embd",
        f"{_TOWER}.embeddings.position_embedding": "v.position_embd",
        f"{_TOWER}.post_layernorm": "v.post_ln",
        f"{_MERGER}.self_attn.q_proj": "v.vit_merger.attn_q",
        f"{_MERGER}.self_attn.k_proj": "v.vit_merger.attn_k",
        f"{_MERGER}.self_attn.v_proj": "v.vit_merger.attn_v",
        f"{_MERGER}.self_attn.out_proj": "v.vit_merger.attn_out",
        f"{_MERGER}.layer_norm1": "v.vit_merger.ln1",
        f"{_MERGER}.pre_norm": "v.vit_merger.ds_ln",
        f"{_MERGER}.linear_1": "v.vit_merger.ds_ffn_up",
        f"{_MERGER}.linear_2": "v.vit_merger.ds_ffn_down",
        "model.merger.mlp.0.pre_norm": "mm.input_norm",
        "model.merger.mlp.0.linear_1": "mm.up",
        "model.merger.mlp.0.linear_2": "mm.down",
    },
    BLOCK,
    f"{_TOWER}.encoder.layers",
    ("mm.down.weight", 0),
    swapped=True,
    sizes={theirs: ours for theirs, ours in SIZES.items() if theirs != "image_size"},
    activations={"use_gelu": GELU},
    further=_minicpm,
    tokens={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    processor="MiniCPMV4_6Processor",
    images="MiniCPMV4_6ImageProcessor",
    named={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    },
    pixels=_slices,
)


def _merges(keys: Keys) -> int:
    """Patches in a row, of which one vector is made."""
    return keys.count("vision.projector.scale_factor", 2)


def _kimi(keys: Keys) -> Mapping[str, Any]:
    rows, columns, _ = keys.shape("v.position_embd.weight", 3)
    if rows != columns:  # transformers takes positions of other places then
        raise keys.wrong(f"v.position_embd.weight has {rows} x {columns} positions, which are no square")
    return {
        "projection_hidden_size": keys.count("vision.embedding_length"),
        "projection_layer_norm_eps": keys.real("vision.attention.layer_norm_epsilon"),
        "vision_config.merge_kernel_size": [_merges(keys)] * 2,
        "vision_config.pos_emb_height": rows,
        "vision_config.pos_emb_width": columns,
    }


def _most(keys: Keys) -> Mapping[str, Any]:
    patch = keys.count("vision.patch_size")
    most = keys.count("vision.image_max_pixels", 16384 * patch**2) // patch**2
    return {"patch_size": patch, "merge_size": _merges(keys), "max_patches": most}


KIMI = Tower(
    "kimik25",
    "kimi_k25",
    "Kimi_K25ForConditionalGeneration",
    "kimi_k25_vision",
    {"deepseek_v3": "deepseek_v3"},
    {
        f"{_TOWER}.patch_embed.proj": "v.patch_embd",
        f"{_TOWER}.final_layernorm": "v.post_ln",
        "model.mm_projector.pre_norm": "mm.input_norm",
        "model.mm_projector.in_proj": "mm.1",
        "model.mm_projector.out_proj": "mm.2",
    },
    {"norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    f"{_TOWER}.layers",
    ("mm.2.weight", 0),
    parameters={f"{_TOWER}.patch_embed.pos_emb.position_embeddings": "v.position_embd.weight"},
    joined={"attn_qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj")},
    by_direction=True,
    sizes={theirs: ours for theirs, ours in SIZES.items() if theirs != "image_size"},
    epsilon="",
    activations={"use_gelu": GELU},
    further=_kimi,
    tokens={
        "image_token_id": "<|media_pad|>",
        "video_token_id": "<|kimi_k25_video_placeholder|>",
        "vision_start_token_id": "<|media_begin|>",
        "vision_end_token_id": "<|media_end|>",
    },
    beyond="<|kimi_k25_video_placeholder|>",
    processor="Kimi_K25Processor",
    images="Kimi_K25ImageProcessor",
    named={"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
    pixels=_most,
)
