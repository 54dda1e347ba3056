"""Small models with vision towers, as folders and as the two GGUF files that llama.cpp has of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.methods.base import Method
from fewbit.models.gguf import towers
from fewbit.models.gguf.processor import without_others
from fewbit.models.gguf.rows.towers import ROWS
from fewbit.models.gguf.tower import Tower
from fewbit.schemes.base import parse
from tests import architectures, gguf_files, models, multimodal

GOLDEN = Path(__file__).parent / "data" / "gguf_towers.json"
SIZE, PATCH = 32, 8
_CLIP: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_SQUARE: dict[str, Any] = {"height": SIZE, "width": SIZE}
_PLAIN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {**_PLAIN_ROPE, "mrope_section": [4, 2, 2]}


@dataclass(frozen=True)
class Kind:
    """type: transformers'. cls: of the converter, after its module. vision, text, whole: entries of the configs.

    renamed: beginnings of names in published checkpoints that transformers saves otherwise. transposed: the ends of
    names of tensors of experts that are [experts, columns, rows] there.
    text_class: the class of the language model in published configs. text_name: its architecture in a file, if fewbit
    writes it as another. text_type: the entry of `gguf_files.TYPES` that it is of; "": as in `multimodal`.
    half: weights that the converter always rounds to float16. values: the ends of names of buffers, and what they are
    filled with. spare: ids of the model beyond the vocabulary of plain text.
    images: the original's processor of images. stated: its preprocessor_config.json, if it needs torchvision.
    processing: arguments of the original's whole processor. processor: its class; "": that of the row.
    alone: entries that only the config of the language model alone has.
    given: the inputs with an image; None: those of `multimodal`.
    text_keys: further keys of the file of the language model.
    sound: tensors of a tower for sound -> their names in the file, which fewbit leaves out.
    """

    type: str
    cls: str
    images: Callable[[], Any]
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()
    text_class: str = ""
    text_name: str = ""
    half: tuple[str, ...] = ()
    processing: Mapping[str, Any] = field(default_factory=dict)
    processor: str = ""
    text_type: str = ""
    stated: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    given: Callable[[Any], dict[str, Tensor]] | None = None
    spare: int = 12
    alone: Mapping[str, Any] = field(default_factory=dict)
    sound: Mapping[str, str] = field(default_factory=dict)
    text_keys: Mapping[str, Any] = field(default_factory=dict)


def _qwen(least: int, most: int, scale: Mapping[str, Any]) -> Any:
    size = {"shortest_edge": least, "longest_edge": most}
    return lambda: transformers.Qwen2VLImageProcessorPil(patch_size=PATCH, size=size, **scale)


def _pixtral() -> Any:
    patch = {"height": PATCH, "width": PATCH}
    return transformers.PixtralImageProcessorPil(size={"longest_edge": SIZE}, patch_size=patch, **_CLIP)


_LIMITS: dict[str, Any] = {"size": {"longest_edge": 2 * SIZE}, "max_image_size": {"longest_edge": SIZE}}


def _around(model: Any, count: int) -> Tensor:
    """Token ids with so many in the places of an image."""
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(3))
    ids[0, 2 : count + 2] = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    return ids


def _pooled(model: Any) -> dict[str, Tensor]:
    """Gemma 4: an image of 6 x 3 patches, of which 9 make one vector, and 9 patches of padding."""
    ids, count = _around(model, 2), 27
    places = torch.full((1, count, 2), -1)
    places[0, :18] = torch.cartesian_prod(torch.arange(3), torch.arange(6)).flip(1)
    patches = torch.rand((1, count, 3 * PATCH**2), generator=torch.Generator().manual_seed(4))
    kinds = (ids == model.config.image_token_id).long()
    return {"input_ids": ids, "pixel_values": patches, "image_position_ids": places, "mm_token_type_ids": kinds}


def _merged(model: Any) -> dict[str, Tensor]:
    """Gemma 4 12B: an image of 2 x 2 patches, already merged, and one of padding."""
    ids = _around(model, 4)
    places = torch.cat([torch.cartesian_prod(torch.arange(2), torch.arange(2)).flip(1), torch.tensor([[-1, -1]])])
    patches = torch.rand((1, 5, 3 * (3 * PATCH) ** 2), generator=torch.Generator().manual_seed(4))
    kinds = (ids == model.config.image_token_id).long()
    return {"input_ids": ids, "pixel_values": patches, "image_position_ids": places[None], "mm_token_type_ids": kinds}


def _tiles(model: Any) -> dict[str, Tensor]:
    """Llama 4: an image as one tile, whose 16 patches make 4 vectors."""
    pixels = torch.randn((1, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(4))
    return {"input_ids": _around(model, 4), "pixel_values": pixels}


def _patches(model: Any) -> dict[str, Tensor]:
    """LFM2-VL: an image of 4 x 2 patches, of which 4 make one vector, and padding."""
    generator, mask = torch.Generator().manual_seed(4), torch.zeros((1, 12), dtype=torch.int32)
    mask[0, :8] = 1
    pixels = torch.randn((1, 12, 3 * 16**2), generator=generator)
    shapes = torch.tensor([[4, 2]])
    given = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"input_ids": _around(model, 2), **given}


def _slices(model: Any) -> dict[str, Tensor]:
    """MiniCPM-V 4.6: an image of 4 x 8 patches and a part of it of 4 x 4, of which 16 make one vector."""
    pixels = torch.randn((1, 3, PATCH, 48 * PATCH), generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": _around(model, 3),
        "pixel_values": pixels,
        "target_sizes": torch.tensor([[4, 8], [4, 4]], dtype=torch.int32),
    }


def _grid(model: Any) -> dict[str, Tensor]:
    """Kimi K2.5: an image of 4 x 6 patches, of which 4 make one vector."""
    pixels = torch.randn((24, 3, PATCH, PATCH), generator=torch.Generator().manual_seed(4))
    return {"input_ids": _around(model, 6), "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])}


_GRID = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]


def _newlines(model: Any) -> dict[str, Tensor]:
    """Granite 4 Vision: an image of two tiles and its overview, each of 4 vectors, with a newline for each row."""
    pixels = torch.randn((1, 3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(4))
    return {"input_ids": _around(model, 14), "pixel_values": pixels, "image_sizes": torch.tensor([[SIZE, 2 * SIZE]])}


def _glm() -> Any:
    own: Any = transformers.Glm4vImageProcessorPil  # its arguments are not typed
    return own(patch_size=PATCH, size={"shortest_edge": 12544, "longest_edge": 9633792}, **_CLIP)


_QWEN = _qwen(3136, 12845056, _CLIP)
_QWEN3 = _qwen(65536, 16777216, _HALF)
_DEEP = {"deepstack_visual_indexes": [1, 2]}
_TEXT_INSIDE = (("model.text_model.", "model."),)
KINDS: dict[str, Kind] = {
    "gemma3": Kind(
        "gemma3",
        "gemma:Gemma3VisionModel",
        lambda: transformers.Gemma3ImageProcessorPil(size=_SQUARE, **_HALF),
        processing={"image_seq_length": 4},
        vision={"hidden_size": 48, "vision_use_head": False},
        text={"query_pre_attn_scalar": 16},
        renamed=(("vision_tower.", "vision_tower.vision_model."),),
        half=("mm_input_projection_weight",),
    ),
    "qwen2_vl": Kind(
        "qwen2_vl",
        "qwenvl:Qwen2VLVisionModel",
        _QWEN,
        vision={"embed_dim": 48},
        text={"rope_parameters": _MROPE},
        text_name="qwen2vl",
    ),
    "qwen2_5_vl": Kind(
        "qwen2_5_vl",
        "qwenvl:Qwen2VLVisionModel",
        _QWEN,
        vision={"hidden_size": 48, "fullatt_block_indexes": [1, 3]},
        text={"rope_parameters": _MROPE},
        text_name="qwen2vl",
    ),
    "qwen3_vl": Kind(
        "qwen3_vl",
        "qwen3vl:Qwen3VLVisionModel",
        _QWEN3,
        vision={"hidden_size": 48, **_DEEP},
        text={"rope_parameters": _MROPE},
        text_name="qwen3vl",
    ),
    "qwen3_vl_moe": Kind(
        "qwen3_vl_moe",
        "qwen3vl:Qwen3VLVisionModel",
        _QWEN3,
        vision={"hidden_size": 48, **_DEEP},
        text={"rope_parameters": _MROPE, "norm_topk_prob": True},
        transposed=("experts.gate_up_proj", "experts.down_proj"),
        text_name="qwen3vlmoe",
    ),
    "qwen3_5": Kind(
        "qwen3_5",
        "qwen3vl:Qwen3VLVisionModel",
        _QWEN3,
        vision={"hidden_size": 48},
        text={"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}},
    ),
    "qwen3_5_moe": Kind(
        "qwen3_5_moe",
        "qwen3vl:Qwen3VLVisionModel",
        _QWEN3,
        vision={"hidden_size": 48},
        text={"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}},
    ),
    "mistral3": Kind(
        "mistral3",
        "llava:LlavaVisionModel",
        _pixtral,
        processing={"patch_size": PATCH, "spatial_merge_size": 2},
        text={"sliding_window": None},
        whole={"tie_word_embeddings": False},
    ),
    "pixtral": Kind(
        "llava",
        "llava:LlavaVisionModel",
        _pixtral,
        processing={"patch_size": PATCH, "spatial_merge_size": 1},
        whole={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "llava": Kind(
        "llava",
        "",
        lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=_SQUARE, **_CLIP),
        vision={"hidden_size": 48},
        half=("patch_embedding.weight", "_projector.linear"),
        processing={
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "idefics3": Kind(
        "idefics3",
        "smolvlm:SmolVLMModel",
        lambda: transformers.Idefics3ImageProcessorPil(**_LIMITS, **_HALF),
        processing={"image_seq_len": 4},
        vision={"hidden_size": 48},
        renamed=_TEXT_INSIDE,
        text_class="LlamaForCausalLM",
    ),
    "internvl": Kind(
        "internvl",
        "internvl:InternVisionModel",
        lambda: transformers.GotOcr2ImageProcessorPil(size=_SQUARE, **_CLIP),
        processing={"image_seq_length": 4},
        vision={"hidden_size": 48},
        whole={"tie_word_embeddings": False, "image_seq_length": 4},
        renamed=(
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
            ("language_model.model.", "model."),
            ("language_model.lm_head", "lm_head"),
        ),
        text_class="Qwen2ForCausalLM",
    ),
}
_CLIPPED = {"input_min": -1.0, "input_max": 0.9, "output_min": -0.8, "output_max": 0.7}
KINDS |= {
    "gemma4": Kind(
        "gemma4",
        "gemma:Gemma4VisionAudioModel",
        lambda: transformers.Gemma4ImageProcessorPil(patch_size=PATCH),
        vision={
            "model_type": "gemma4_vision",
            "patch_size": PATCH,
            "max_position_embeddings": 131_072,  # not used
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 8,
            "standardize": True,
            "use_clipped_linears": True,
        },
        text={"use_bidirectional_attention": "vision"},
        text_type="gemma4_text",
        values={**_CLIPPED, "std_bias": 0.1, "std_scale": 0.7},
        given=_pooled,
        spare=10,  # as many as tokens: the converter cuts off others from one of two embeddings
    ),
    "gemma4_unified": Kind(
        "gemma4_unified",
        "gemma:Gemma4UnifiedVisionAudioModel",
        lambda: transformers.Gemma4UnifiedImageProcessor(patch_size=PATCH),
        vision={
            "model_type": "gemma4_unified_vision",
            "patch_size": PATCH,
            "mm_embed_dim": 48,
            "mm_posemb_size": 8,
            "output_proj_dims": 48,
        },
        text={"num_experts": None, "moe_intermediate_size": None, "final_logit_softcapping": 3.0},
        whole={"audio_config": transformers.Gemma4UnifiedAudioConfig(audio_embed_dim=32)},
        stated={
            "image_mean": [0.0] * 3,
            "image_std": [1.0] * 3,
            "image_processor_type": "Gemma4UnifiedImageProcessor",
            "patch_size": PATCH,
        },
        given=_merged,
        spare=10,
        alone={"hidden_size_per_layer_input": 0, "enable_moe_block": False},
        sound={"model.embed_audio.embedding_projection.weight": "mm.a.input_projection.weight"},
    ),
    "llama4": Kind(
        "llama4",
        "llama4:Llama4VisionModel",
        lambda: transformers.Llama4ImageProcessor(size=_SQUARE),
        processing={"patch_size": PATCH},
        stated={**_HALF, "size": _SQUARE, "image_processor_type": "Llama4ImageProcessor"},
        vision={
            "hidden_size": 48,
            "intermediate_size": 192,
            **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 56),
        },
        text_type="llama4_text",
        given=_tiles,
    ),
    "lfm2_vl": Kind(
        "lfm2_vl",
        "lfm2:LFM2VLModel",
        lambda: transformers.Lfm2VlImageProcessor(),
        vision={"hidden_size": 48, "patch_size": 16, "num_patches": 16, "vision_use_head": False},
        whole={"projector_hidden_size": 72},
        text_type="lfm2",
        text_class="Lfm2ForCausalLM",
        renamed=(("model.vision_tower.", "model.vision_tower.vision_model."),),
        stated={**_HALF, "image_processor_type": "Lfm2VlImageProcessor"},
        given=_patches,
    ),
    "minicpmv4_6": Kind(
        "minicpmv4_6",
        "minicpm:MiniCPMV4_6VisionModel",
        lambda: transformers.MiniCPMV4_6ImageProcessorPil(scale_resolution=32, patch_size=PATCH, **_HALF),
        vision={"hidden_size": 48, "image_size": 6 * PATCH},
        text={"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}},
        whole={"insert_layer_id": 1},
        text_type="qwen3_5_text",
        given=_slices,
    ),
    "kimi_k25": Kind(
        "kimi_k25",
        "kimivl:KimiK25Model",
        lambda: transformers.Kimi_K25ImageProcessor(patch_size=PATCH, **_HALF),
        vision={"hidden_size": 48, "pos_emb_height": 4, "pos_emb_width": 4, "init_pos_emb_height": 4},
        whole={"projection_hidden_size": 48},
        text_type="deepseek_v3",
        text_class="KimiK25ForConditionalGeneration",
        stated={**_HALF, "patch_size": PATCH, "image_processor_type": "Kimi_K25ImageProcessor"},
        renamed=(
            ("language_model.model.blocks.", "language_model.model.layers."),
            ("model.mm_projector.", "mm_projector."),
            ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
        ),
        given=_grid,
    ),
    "granite4_vision": Kind(
        "granite4_vision",
        "granite:Granite4VisionMmprojModel",
        lambda: transformers.LlavaNextImageProcessorPil(
            image_grid_pinpoints=_GRID, size=_SQUARE, crop_size=_SQUARE, **_HALF
        ),
        processing={
            "patch_size": PATCH,
            "downsample_rate": "2/4",
            "vision_feature_select_strategy": "full",
        },
        vision={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "num_hidden_layers": 6,  # as many as projectors, which the converter needs
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        text={"num_hidden_layers": 8},
        whole={
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": _GRID,
            "deepstack_layer_map": [(-3, 5), (-1, 0)],
            "spatial_target_layers": [6, 2, 7, 4],
            "spatial_vision_layer": -1,
            "qformer_config": transformers.Blip2QFormerConfig(
                num_hidden_layers=1,
                hidden_size=64,
                num_attention_heads=1,
                intermediate_size=96,
                cross_attention_frequency=1,
                encoder_hidden_size=64,
                use_qformer_text_input=False,
            ),
        },
        text_class="GraniteForCausalLM",
        renamed=(("model.vision_tower.", "model.vision_tower.vision_model."),),
        text_keys={"granite.deepstack_mapping": [-1, -1, 1, -1, 2, 3, 4, 5]},
        given=_newlines,
    ),
    "lighton_ocr": Kind(
        "lighton_ocr",
        "lighton_ocr:LightOnOCRVisionModel",
        lambda: transformers.PixtralImageProcessorPil(
            size={"longest_edge": SIZE}, patch_size={"height": 2 * PATCH, "width": 2 * PATCH}, **_CLIP
        ),
        processing={"patch_size": PATCH, "spatial_merge_size": 2},
        text_class="Qwen3ForCausalLM",
    ),
    "glm4v_moe": Kind(
        "glm4v_moe",
        "qwen3vl:Glm4VVisionModel",
        _glm,
        vision={"hidden_size": 48, "out_hidden_size": 64, "rms_norm_eps": 1e-6},
        text={"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
        text_name="glm4moe",
        text_class="Glm4MoeForCausalLM",
    ),
    "glm4v": Kind(
        "glm4v",
        "qwen3vl:Glm4VVisionModel",
        _glm,
        vision={"hidden_size": 48, "out_hidden_size": 64, "rms_norm_eps": 1e-6},
        text={"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
        alone={"mrope_section": [2, 1, 1], "head_dim": 16, "attention_bias": True},
    ),
    "glm_ocr": Kind(
        "glm_ocr",
        "qwen3vl:Glm4VVisionModel",
        _glm,
        vision={"hidden_size": 48, "out_hidden_size": 64, "rms_norm_eps": 1e-6},
        text={"rope_parameters": {**_MROPE, "mrope_section": [6, 5, 5], "partial_rotary_factor": 1.0}, "head_dim": 32},
        alone={"mrope_section": [6, 5, 5], "attention_bias": False},
    ),
    "exaone4_5": Kind(
        "exaone4_5",
        "exaone:Exaone4_5VisionModel",
        _QWEN,
        vision={"hidden_size": 48, "num_heads": 4, "num_key_value_heads": 2, "fullatt_block_indexes": [1, 3]},
        text_type="exaone4",
        text_class="Exaone4ForCausalLM",
        stated={
            **_CLIP,
            "patch_size": PATCH,
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "image_processor_type": "Qwen2VLImageProcessor",
        },
    ),
}
KINDS["smolvlm"] = replace(
    KINDS["idefics3"],
    type="smolvlm",
    images=lambda: transformers.SmolVLMImageProcessorPil(**_LIMITS, **_HALF),
    processor="SmolVLMProcessor",
)
# Second kinds of towers of a row, which the tensors of a file tell apart. A hyphen separates what differs.
_RMS = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
KINDS |= {
    "gemma4-plain": replace(
        KINDS["gemma4"], vision={**KINDS["gemma4"].vision, "standardize": False, "use_clipped_linears": False}
    ),
    "internvl-rms": replace(KINDS["internvl"], vision={**KINDS["internvl"].vision, **_RMS}),
    "lfm2_vl-norm": replace(KINDS["lfm2_vl"], whole={**KINDS["lfm2_vl"].whole, "projector_use_layernorm": False}),
    "lfm2_vl-bias": replace(KINDS["lfm2_vl"], whole={**KINDS["lfm2_vl"].whole, "projector_bias": False}),
    "glm4v_moe-bias": replace(KINDS["glm4v_moe"], vision={**KINDS["glm4v_moe"].vision, "attention_bias": True}),
}
# Rows of fewbit that read files of kinds with another type
ROW_OF = {"smolvlm": "idefics3"}


def row_of(kind: str) -> Tower:
    """The row for a kind."""
    wanted, pixtral = ROW_OF.get(kind, KINDS[kind].type), kind in ("pixtral", "mistral3")
    return next(row for row in ROWS if row.model_type == wanted and (row.projector == "pixtral") == pixtral)


def config(kind: str) -> Any:
    """The config of a small model of a kind, whose vocabulary has the tokens for images."""
    case, row = KINDS[kind], row_of(kind)
    made = multimodal.config(case.type)
    if kind == "pixtral":
        made.vision_config = multimodal.config("mistral3").vision_config
    encoder = case.vision.get("model_type")
    if encoder is not None and getattr(made.vision_config, "model_type", None) != encoder:
        made.vision_config = architectures.small(CONFIG_MAPPING[encoder], architectures.SIZES, {})
    if case.text_type:
        own: Any = CONFIG_MAPPING[case.text_type]
        special = {own.model_type: gguf_files.TYPES[case.text_type]}
        made.text_config = architectures.small(own, architectures.SIZES, special)
    more = {"num_hidden_layers": 4, "depth": 4, **case.vision}
    for part, entries in ((made.vision_config, more), (made.text_config, case.text), (made, case.whole)):
        for key, value in entries.items():
            if key not in ("depth", "num_hidden_layers") or hasattr(part, key):
                setattr(part, key, value)
    ids = {token: models.VOCAB + i for i, token in enumerate(tokens(kind))}
    for entry in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(made.text_config, entry):
            setattr(made.text_config, entry, models.VOCAB + case.spare)
    for entry, token in row.tokens.items():
        setattr(made, entry, ids[token])
    return made


def tokens(kind: str) -> list[str]:
    """The tokens for images, in the order of their ids."""
    row = row_of(kind)
    more = ["<fake_token_around_image>", "<end_of_utterance>"] if row.model_type == "idefics3" else []
    return list(dict.fromkeys([*row.tokens.values(), *row.named.values(), *more]))


def save(folder: Path, kind: str) -> Path:
    """A random model of a kind with its processor, in the Hugging Face layout."""
    case = KINDS[kind]
    multimodal.save(folder, case.type, config(kind))
    path = folder / "model.safetensors"
    state = load_file(path)
    for name in state:
        if any(part in name for part in case.half):
            state[name] = state[name].half().float()
        for end, value in case.values.items():
            if name.endswith(end):
                state[name] = torch.full_like(state[name], value)
    save_file(state, path, metadata={"format": "pt"})
    tokenizer(kind).save_pretrained(folder)
    if case.stated:
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(case.stated)), encoding="utf-8")
    else:
        case.images().save_pretrained(folder)
    own = {**case.processing, "processor_class": row_of(kind).processor}
    (folder / "processor_config.json").write_text(json.dumps(own), encoding="utf-8")
    return folder


def processor(kind: str) -> Any:
    """The processor of the original model, without its part for videos. ImportError if it needs torchvision."""
    case = KINDS[kind]
    name = case.processor or row_of(kind).processor
    cls: Any = getattr(transformers, name)
    made = without_others(cls, image_processor=case.images(), tokenizer=tokenizer(kind), **case.processing)
    made.marks = row_of(kind).marks
    return made


def tokenizer(kind: str) -> Any:
    """The tokenizer of the tests with the tokens for images."""
    plain = models.tokenizer()
    plain.add_tokens(tokens(kind), special_tokens=True)
    make: Any = transformers.PreTrainedTokenizerFast  # whose constructor is not typed
    usual = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": models.CONTEXT}
    return make(tokenizer_object=plain.backend_tokenizer, **usual, **row_of(kind).named)


def published(folder: Path, out: Path, kind: str) -> Path:
    """A copy of a model with the names and entries of published checkpoints, for the converter."""
    case = KINDS[kind]
    shutil.copytree(folder, out)
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old, new = next((each for each in case.renamed if name.startswith(each[0])), ("", ""))
        turned = name.endswith(case.transposed) if case.transposed else False
        state[new + name.removeprefix(old)] = tensor.transpose(1, 2).contiguous() if turned else tensor
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    if case.text_class:
        place = out / "config.json"
        found = json.loads(place.read_text(encoding="utf-8"))
        found["text_config"]["architectures"] = [case.text_class]
        place.write_text(json.dumps(found), encoding="utf-8")
    return out


def original(folder: Path) -> Any:
    """The whole model, by transformers alone, in float32."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cls = getattr(transformers, found["architectures"][0])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def text_file(folder: Path, path: Path, kind: str, scheme: str = "f32") -> Path:
    """The language model of a folder as a GGUF file, by fewbit's writer."""
    case, whole, row = KINDS[kind], original(folder), row_of(kind)
    inner = whole.config.text_config.to_dict()
    plain = next(read for read, inside in row.texts.items() if inside == inner["model_type"])
    alone = folder.parent / f"{path.stem}-text"
    tied = {"tie_word_embeddings": whole.config.tie_word_embeddings}
    own = {**inner, "model_type": plain, **tied, **case.alone}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**own), dtype=torch.float32)
    state = {}
    for name, tensor in whole.state_dict().items():
        if name.startswith(row.language):
            state[f"model{name.removeprefix(row.language)}"] = tensor
        elif name.startswith(row.head):
            state[f"lm_head{name.removeprefix(row.head)}"] = tensor
    made.load_state_dict(state)
    made.save_pretrained(alone)
    tokenizer(kind).save_pretrained(alone)
    if not case.text_name:
        gguf_files.written(alone, path, scheme)
        return changed(path, path, keys_of(case.text_keys)) if case.text_keys else path
    gguf_files.written(alone, path.with_suffix(".plain"), scheme)
    gguf_files.renamed(path.with_suffix(".plain"), path, case.text_name)
    sections = np.array([*inner["rope_parameters"]["mrope_section"], 0], np.int32)
    return changed(path, path, {f"{case.text_name}.rope.dimension_sections": sections})


def tower_file(folder: Path, path: Path, kind: str, scheme: str = "f32", *, older: bool = False) -> Path:
    """The tower of a folder as a GGUF file with the keys that llama.cpp's converter wrote.

    older: with the up and the down projections of MLPs exchanged, as all files of LLaVA have them.
    """
    whole, row = original(folder), row_of(kind)
    parts = towers.parts(whole.config, towers.swapped(row) if older or row.projector == "mlp" else row)
    if row.model_type == "llava" and row.projector == "mlp":  # a file lacks the last block, which is not used
        last = f"{row.layers}.{whole.config.vision_config.num_hidden_layers - 1}."
        parts = {name: part for name, part in parts.items() if not name.startswith(last)}
    found: dict[str, Tensor] = {}
    for name, tensor in whole.state_dict().items():
        if (part := parts.get(name)) is not None:
            for each, piece in zip(part.names, part.to_file(tensor), strict=True):  # shares are in their order
                found[each] = piece if part.share[0] == 0 else torch.cat([found[each], piece])
        elif (heard := KINDS[kind].sound.get(name)) is not None:
            found[heard] = tensor
    entries = [
        Entry(name, scheme if tensor.dim() > 1 else "f32", tuple(tensor.shape)) for name, tensor in found.items()
    ]
    keys = {"general.type": "mmproj", "general.architecture": "clip", **keys_of(golden()[kind]["keys"])}
    with GgufWriter(path, keys, entries) as writer:
        for entry in entries:
            writer.add(entry.name, found[entry.name].to(entry.spec.dtype).contiguous())
    return path


def inputs(kind: str, model: Any) -> dict[str, Tensor]:
    """Token ids with an image among them."""
    if (special := KINDS[kind].given) is not None:
        return special(model)
    given = multimodal.inputs(KINDS[kind].type, model)
    own = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    given["input_ids"] = given["input_ids"].masked_fill(given["input_ids"] == multimodal.IMAGE_TOKEN, own)
    return given


def keys_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as a file has them: lists of numbers are arrays."""
    return {key: _array(value) if isinstance(value, list) else value for key, value in stored.items()}


def _array(value: list[Any]) -> Any:
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    return np.array(value, np.int32 if whole else bool if isinstance(value[0], bool) else np.float32)


def changed(path: Path, out: Path, keys: Mapping[str, Any] = {}, tensors: Mapping[str, Tensor | None] = {}) -> Path:
    """A copy of a file with other keys and float32 tensors. None: without it."""
    file = GgufFile(path)
    stored = {name: file.get(name).clone() for name in file.entries}
    entries = [entry for name, entry in file.entries.items() if name not in tensors]
    more = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    entries += [Entry(name, "f32", tuple(tensor.shape)) for name, tensor in more.items()]
    metadata = {key: value for key, value in (file.metadata | dict(keys)).items() if value is not None}
    with GgufWriter(out, metadata, entries, overwrite=True) as writer:
        for entry in entries:
            writer.add(entry.name, (stored | more)[entry.name])
    return out


def quantized(path: Path, out: Path, scheme: str) -> Path:
    """A copy of a file with the matrices that blocks of `scheme` fit quantized."""
    file, held = GgufFile(path), dict[str, tuple[Entry, Tensor]]()
    for name, entry in file.entries.items():
        tensor = file.get(name).clone()
        held[name] = entry, tensor
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            weight = Method().quantize(tensor.float(), parse(scheme), None).weight
            held[name] = Entry(name, scheme, entry.shape), weight.parts["blocks"]
    with GgufWriter(out, file.metadata, [entry for entry, _ in held.values()]) as writer:
        for name, (_, tensor) in held.items():
            writer.add(name, tensor)
    return out


def golden() -> dict[str, Any]:
    """Kind -> digest and keys of the file that llama.cpp's converter made of its numbered model."""
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found
