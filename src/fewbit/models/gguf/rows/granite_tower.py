"""The vision tower of Granite 4 Vision: several projectors, each of which feeds one layer of the language model.

Source: conversion/granite.py and tools/mtmd/ of llama.cpp, and the configs of the published models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.models.gguf.metadata import Keys
from fewbit.models.gguf.rows.shared import GELU
from fewbit.models.gguf.tower import BLOCK, Tower

_TILES = 64  # the most in a row of an image; published models have up to 10
_OFFSETS = 4  # of the projectors that read one patch of each square of four


def _granite(keys: Keys, spoken: Keys) -> Mapping[str, Any]:
    layers = keys.count("vision.block_count")
    read = keys.wholes("vision.feature_layer", 1)
    offsets = keys.wholes("vision.projector.spatial_offsets", len(read), -1)
    fed = dict.fromkeys(range(len(read)), 0)  # the first one is the embedding, so it feeds the first layer
    fed |= {place: layer for layer, place in enumerate(spoken.wholes("deepstack_mapping", 1, -1)) if place > 0}
    spatial = {offset: place for place, offset in enumerate(offsets) if offset >= 0}
    if (
        len(offsets) != len(read)
        or sorted(spatial) != list(range(_OFFSETS))
        or len({read[place] for place in spatial.values()}) != 1
    ):
        raise keys.wrong(f"clip.vision.projector.spatial_offsets is {offsets}, which fewbit does not read")
    if len(set(fed.values())) != len(read) or max(read) >= layers:
        raise keys.wrong(
            f"clip.vision.feature_layer is {read}, and {spoken.prefix}.deepstack_mapping of {spoken.file.path} does "
            "not name a layer for each"
        )
    by_block = sorted((read[place] - layers, fed[place]) for place, offset in enumerate(offsets) if offset < 0)
    query, window = (keys.count(f"vision.projector.{each}_side") for each in ("query", "window"))
    return {
        "deepstack_layer_map": [list(each) for each in by_block],
        "spatial_vision_layer": read[spatial[0]] - layers,
        "spatial_target_layers": [fed[spatial[offset]] for offset in range(_OFFSETS)],
        "downsample_rate": f"{query}/{window}",
        "image_grid_pinpoints": _grid(keys),
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": keys.shape("v.proj_blk.0.ffn_up.weight")[0],
            "cross_attention_frequency": 1,
            "max_position_embeddings": 2048,
            "use_qformer_text_input": False,
        },
    }


def _grid(keys: Keys) -> list[list[int]]:
    """Heights and widths of images that are cut into tiles."""
    flat, tile = keys.wholes("vision.image_grid_pinpoints", 2, 1), keys.count("vision.image_size")
    if len(flat) % 2 or any(each % tile or each > _TILES * tile for each in flat):
        raise keys.wrong(
            f"clip.vision.image_grid_pinpoints is {flat[:20]}, not pairs of sizes that {tile} divides, of at most "
            f"{_TILES} tiles"
        )
    return [[height, width] for width, height in zip(flat[::2], flat[1::2], strict=True)]


def _places(config: Any) -> list[str]:
    """The projectors in the order of the layers that they feed."""
    count = config.text_config.num_hidden_layers
    found = [(layer % count, f"layerwise_projectors.{i}") for i, (_, layer) in enumerate(config.deepstack_layer_map)]
    found += [(layer, f"spatial_projectors.{i}") for i, layer in enumerate(config.spatial_target_layers)]
    return [f"model.{name}" for _, name in sorted(found)]


def _cut(keys: Keys) -> Mapping[str, Any]:
    size = keys.count("vision.image_size")
    square = {"height": size, "width": size}
    return {"image_grid_pinpoints": _grid(keys), "size": square, "crop_size": square}


def _rate(keys: Keys) -> Mapping[str, Any]:
    query, window = (keys.count(f"vision.projector.{each}_side") for each in ("query", "window"))
    patch = keys.count("vision.patch_size")
    return {"patch_size": patch, "downsample_rate": f"{query}/{window}", "vision_feature_select_strategy": "full"}


_TOWER, _LAYER = "model.vision_tower", "qformer.encoder.layer.0"
_LINEARS: Sequence[tuple[str, str]] = (
    ("attention.query", "attn_q"),
    ("attention.key", "attn_k"),
    ("attention.value", "attn_v"),
    ("output.dense", "attn_out"),
    ("output.LayerNorm", "attn_norm"),
)
GRANITE = Tower(
    "granite4_vision",
    "granite4_vision",
    "Granite4VisionForConditionalGeneration",
    "siglip_vision_model",
    {"granite": "granite4_vision_text"},
    {
        f"{_TOWER}.embeddings.patch_embedding": "v.patch_embd",
        f"{_TOWER}.embeddings.position_embedding": "v.position_embd",
        f"{_TOWER}.post_layernorm": "v.post_ln",
    },
    BLOCK,
    f"{_TOWER}.encoder.layers",
    ("v.proj_blk.0.linear.weight", 0),
    parameters={"model.image_newline": "v.image_newline"},
    projectors={
        **{f"{_LAYER}.attention.{theirs}": f"self_{ours}" for theirs, ours in _LINEARS},
        **{f"{_LAYER}.crossattention.{theirs}": f"cross_{ours}" for theirs, ours in _LINEARS},
        f"{_LAYER}.intermediate_query.dense": "ffn_up",
        f"{_LAYER}.output_query.dense": "ffn_down",
        f"{_LAYER}.output_query.LayerNorm": "ffn_norm",
        "qformer.layernorm": "post_norm",
        "norm": "norm",
        "out_linear": "linear",
    },
    projector_parameters={"query": "query", "image_positions": "img_pos"},
    places=_places,
    activations={"use_gelu": GELU},
    fixed={"vision_feature_select_strategy": "full", "vision_config.vision_use_head": False},
    both=_granite,
    tokens={"image_token_index": "<image>"},
    processor="Granite4VisionProcessor",
    images="LlavaNextImageProcessor",
    named={"image_token": "<image>"},
    pixels=_cut,
    processing=_rate,
)
