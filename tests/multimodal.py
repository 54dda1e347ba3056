"""Every type of model that transformers builds as an image-text-to-text or multimodal LM: how to make a tiny one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import architectures, models

_MAPPINGS = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
CLASSES: dict[str, str] = {}  # type -> class
for _name in reversed(_MAPPINGS):
    CLASSES |= getattr(modeling_auto, _name, {})
CLASSES["shieldgemma2"] = "ShieldGemma2ForImageClassification"  # as in its checkpoints; a classifier
TYPES = tuple(sorted(CLASSES))

IMAGE_TOKEN, START_TOKEN, END_TOKEN = 251, 254, 255  # bytes that no text of a test has
_TOKENS = {
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN),
    **dict.fromkeys(("video_token_id", "video_token_index"), 252),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 253),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_index", "boi_token_id"), START_TOKEN),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_index", "eoi_token_id"), END_TOKEN),
    **dict.fromkeys(("video_start_token_id", "audio_start_token_id", "boa_token_id"), 256),
    **dict.fromkeys(("video_end_token_id", "audio_end_token_id", "eoa_token_id"), 257),
}
_TOWER = {
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
    **dict.fromkeys(("embed_dim", "out_hidden_size", "projection_dim", "output_dim", "text_hidden_size"), 64),
    **dict.fromkeys(("projector_hidden_size", "projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "mlp_dim", "alignment_intermediate_size"), 96),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "projection_intermediate_size"), 96),
    "num_position_embeddings": 16,
    "max_image_size": 64,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "output_channels": 32,
}
_SIZES = architectures.SIZES | _TOKENS | _TOWER
_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_HALF_TURNED = {  # half of each head's columns
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
}
_MORE: dict[str, dict[str, Any]] = architectures.MORE | {
    "apertus1p5": {"image_token_offset": 256, "audio_token_offset": 272},
    "apertus1p5_vision_tokenizer": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 16},
    "chameleon": {"vocabulary_map": {"<image>": 251}},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 16},
    "cosmos3_edge_text": _TURNED,
    "cosmos3_omni_text": _TURNED,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": 251, "<|extra_200|>": 252}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 16},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 2} | _TURNED,
    "florence_vision": {"patch_size": [7, 3, 3, 3], "embed_dim": [32] * 4, "num_heads": [4] * 4},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v_moe_text": _HALF_TURNED,
    "glm4v_text": _TURNED,
    "glm5_next_text": {"layer_types": ["linear_attention", "full_attention"]}
    | {"num_key_value_heads": 4, "index_topk": 16, "qk_rope_head_dim": 0},
    "glm_ocr_text": _TURNED,
    "glm46v_text": _TURNED,
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "2/4"},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "idefics": {"cross_layer_interval": 2},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 16},
    "kyutai_speech_to_text": {"audio_pad_token_id": 253},
    "mistral_large4_text": {"num_key_value_heads": 4},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [32, 32]},
    "mimi": {"upsample_groups": 64},
    "Nemotron3DiarizationHeadConfig": {"hidden_size": 192, "audio_hidden_size": 64},
    "muse_spark_audio": {"patch_sizes": [16, 6], "hidden_sizes": [32, 64], "depths": [1, 1]},
    "omniasr_audio": {"conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2]},
    "paddleocr_vl_text": _TURNED,
    "pix2struct_text_model": {"d_kv": 16},
    "pix2struct_vision_model": {"d_kv": 16},
    "pp_formulanet_vision": {"post_conv_in_channels": 32, "post_conv_mid_channels": 32, "post_conv_out_channels": 64}
    | {"decoder_hidden_size": 64},
    "qwen2_5_omni_text": _TURNED,
    "qwen2_5_vl_text": _TURNED,
    "qwen2_vl_text": _TURNED,
    "radio": {"video_temporal_patch_size": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "wavtokenizer_encoder": {"codebook_dim": 64, "codebook_size": 16},
}

# Leading sizes of `pixel_values`, before channels, height and width, if they are not just [1].
_BATCHES = {
    **dict.fromkeys(("idefics3", "smolvlm"), (1, 1)),
    **dict.fromkeys(("llava_next", "llava_next_video"), (1, 2)),
}
# Types that are run with an image too. The others are compared on text; no tiny input with an image is made for them.
_IMAGES = """
aya_vision cohere2_vision cosmos3_edge cosmos3_omni exaone4_5 gemma3 glm46v glm4v glm4v_moe glm5_next glm_ocr
glmga got_ocr2 hyperclovax_vision_v2 idefics3 internvl lfm3_vl lighton_ocr llava llava_next llava_next_video
minimax_m3_vl mistral3 mistral_large4 ovis2 paligemma pp_chart2table qianfan_ocr qwen2_5_omni_thinker
qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe smolvlm step3p7
video_llava
"""
WITH_IMAGE = frozenset(_IMAGES.split())

# Types that no tiny model is made of here, and what happens instead.
NOT_BUILT: dict[str, str] = {
    "cohere_compass": "full_attention",
    "dots3_note": "per_layer_config",
    "fast_vlm": "PIL|timm",
    "gemma3n": "PIL|timm",
    "inkling2": "negative dimension",
    "inkling2_loop": "negative dimension",
    "inkling_mm_model": "scipy",
    "kyutai_speech_to_text": "too large",
    "nemo_speechlm": "blank_token_id",
    "perception_lm": "PIL|timm",
    "qwen2_5_omni": "too large",
    "qwen3_omni_moe": "shared_expert_intermediate_size",
    "qwen4_exp": "NoneType",
}
# Types that fewbit refuses, and with what words.
REFUSED: dict[str, str] = {
    "diffusion_gemma": "blocks that share weights cannot be quantized yet",
    "ernie4_5_vl_moe": "makes several tensors of",  # experts for text and for images of one list
    "shieldgemma2": "the weights are of ShieldGemma2ForImageClassification",
}
# The same for plans that calibrate.
_NO_TEXT = "does not run on text alone"
CALIBRATED = dict.fromkeys(("idefics", "udop", "voxtral_realtime"), _NO_TEXT)


def refusal(kind: str, plan: str) -> str | None:
    """A pattern of the error by which `fewbit.quantize` refuses that type; None if it serves it."""
    return REFUSED.get(kind) or (CALIBRATED.get(kind) if plan in ("gptq-4bit", "awq-4bit") else None)


def config(kind: str) -> Any:
    """A config of that type with small sizes."""
    make: Any = CONFIG_MAPPING[kind]
    if kind == "vision-encoder-decoder":  # older versions of transformers have no default
        parts = (architectures.small(CONFIG_MAPPING[each], _SIZES, _MORE) for each in ("vit", "bert"))
        made = make.from_encoder_decoder_configs(*parts)
    else:
        made = architectures.small(make, _SIZES, _MORE)
    made.architectures = [CLASSES[kind]]
    return made


def save(folder: Path, kind: str, made: Any = None) -> Path:
    """A random model of that type and a tokenizer, in the Hugging Face layout. made: its config."""
    cls, made = getattr(transformers, CLASSES[kind]), made or config(kind)
    with torch.device("meta"):
        model = cls._from_config(made)
    if sum(p.numel() for p in model.parameters()) > 20_000_000:
        raise ValueError("too large")
    with architectures.seeded():
        model = cls._from_config(made, dtype=torch.float32)
    architectures.draw(model, len(kind))
    model.eval().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def inputs(kind: str, model: Any) -> dict[str, Tensor]:
    """Token ids, and for a type in WITH_IMAGE an image among them, as `model` takes it."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 200, (1, 72), generator=generator)
    if kind in _NEEDED:
        image = torch.randn(1, 3, 32, 32, generator=generator)
        return _NEEDED[kind](ids, image, model.config, generator)
    if kind not in WITH_IMAGE:
        return {"input_ids": ids}
    vision = model.config.vision_config
    takes = inspect.signature(type(model).forward).parameters
    given: dict[str, Tensor] = {}
    if grid := next((name for name in ("image_grid_thw", "grid_thws") if name in takes), None):
        merge = getattr(vision, "spatial_merge_size", 1)
        given[grid] = torch.tensor([[1, 2 * merge, 2 * merge]])
        numbers = (getattr(vision, "in_channels", 3), getattr(vision, "temporal_patch_size", 1), vision.patch_size)
        pixels, count = (4 * merge**2, numbers[0] * numbers[1] * numbers[2] ** 2), 4
    else:
        size = vision.image_size if isinstance(getattr(vision, "image_size", 32), int) else 32
        pixels, count = (*_BATCHES.get(kind, (1,)), 3, size, size), 0
    name = "pixel_values" if "pixel_values" in takes else "pixel_values_images"
    given[name] = torch.randn(pixels, generator=generator)
    if "image_sizes" in takes and kind != "llava":
        given["image_sizes"] = torch.tensor([[32, 32]])
    if not count:
        with torch.inference_mode():
            count = _width_of(model.get_image_features(**given))
    ids[0, 1], ids[0, 2 : count + 2], ids[0, count + 2] = START_TOKEN, IMAGE_TOKEN, END_TOKEN
    given["input_ids"] = ids
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            given[name] = (ids == IMAGE_TOKEN).long()
    return given


Given = dict[str, Tensor]


def _queries(ids: Tensor, image: Tensor, config: Any, _: torch.Generator) -> Given:
    """BLIP-2 and its kind: an image in as many tokens as there are queries."""
    frames = 2 if "video" in config.model_type else 1
    token = IMAGE_TOKEN if frames == 1 else config.video_token_index
    ids = torch.cat([ids.new_full((1, config.num_query_tokens * frames), token), ids[:, :8]], 1)
    given = {"input_ids": ids, "pixel_values": image if frames == 1 else image.expand(1, frames, -1, -1, -1)}
    return given if config.model_type == "blip-2" else given | {"qformer_input_ids": ids[:, -8:]}


def _robot(ids: Tensor, image: Tensor, config: Any, generator: torch.Generator) -> Given:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    vision = config.vlm_config.vision_config
    ids[0, : (vision.image_size // vision.patch_size) ** 2] = IMAGE_TOKEN
    return {
        "state": drawn(1, config.max_state_dim),
        "noise": drawn(1, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.5]),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": image[:, None],
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def _latents(ids: Tensor, image: Tensor, config: Any, _: torch.Generator) -> Given:
    places = torch.arange(ids.shape[1]) < config.latent_query_num
    return {"input_ids": ids, "pixel_values": image, "image_embeds_position_mask": places[None].long()}


def _sound(ids: Tensor, _: Tensor, config: Any, generator: torch.Generator) -> Given:
    audio = config.audio_config
    count = 8
    frames = 2 * config.downsample_factor * count  # a convolution halves them
    given = torch.randn(1, audio.num_mel_bins, frames, generator=generator)
    return {"input_ids": ids[:, :count], "input_features": given}


def _pages(ids: Tensor, _: Tensor, config: Any, generator: torch.Generator) -> Given:
    places = torch.arange(1, 9)[None, :, None].float()  # row and column of each patch
    patches = torch.randn(1, 8, config.vision_config.patch_embed_hidden_size, generator=generator)
    return {"flattened_patches": torch.cat([places, places, patches], 2), "decoder_input_ids": ids}


def _boxes(ids: Tensor, _: Tensor, config: Any, generator: torch.Generator) -> Given:
    corners = torch.rand(1, ids.shape[1], 2, generator=generator) / 2
    return {"input_ids": ids, "bbox": torch.cat([corners, corners + 0.25], 2), "decoder_input_ids": ids}


# How to make the inputs of a type that needs more than text in each forward pass: ids, an image, config, generator.
_NEEDED: dict[str, Callable[[Tensor, Tensor, Any, torch.Generator], Given]] = {
    "blip": lambda ids, image, config, generator: {"input_ids": ids, "pixel_values": image},
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _queries),
    "idefics": lambda ids, image, config, generator: {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": image[:, None],
        "image_attention_mask": torch.ones(1, ids.shape[1], 1, dtype=torch.long),
    },
    **dict.fromkeys(
        ("florence2", "t5gemma2"),
        lambda ids, image, config, generator: {"input_ids": ids, "decoder_input_ids": ids[:, 7:30]},
    ),
    "kosmos-2": _latents,
    "pi0": _robot,
    "pix2struct": _pages,
    **dict.fromkeys(
        ("pp_formulanet", "vision-encoder-decoder"),
        lambda ids, image, config, generator: {"pixel_values": image, "decoder_input_ids": ids},
    ),
    "udop": _boxes,
    "voxtral_realtime": _sound,
}
WITH_IMAGE |= _NEEDED.keys() - {"florence2", "t5gemma2", "udop", "voxtral_realtime"}
WITH_SOUND = frozenset({"voxtral_realtime"})


def _width_of(features: Any) -> int:
    """Number of rows in what a model's `get_image_features` returns."""
    found = getattr(features, "pooler_output", features)
    return sum(each[..., 0].numel() for each in (found if isinstance(found, (tuple, list)) else [found]))
