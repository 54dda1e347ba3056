"""Every type of model that transformers builds as an image-text-to-text or multimodal LM: how to make a tiny one."""

from __future__ import annotations

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
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "output_channels": 32,
}
_SIZES = architectures.SIZES | _TOKENS | _TOWER
_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_MORE: dict[str, dict[str, Any]] = architectures.MORE | {
    "cosmos3_edge_text": _TURNED,
    "cosmos3_omni_text": _TURNED,
    "glm4v_text": _TURNED,
    "glm4v_moe_text": _TURNED,
    "glm_ocr_text": _TURNED,
    "qwen2_vl_text": _TURNED,
    "qwen2_5_vl_text": _TURNED,
    "qwen2_5_omni_text": _TURNED,
    "paddleocr_vl_text": _TURNED,
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 2} | _TURNED,
    "molmo2_vision": {"image_size": [32, 32]},
    "chameleon": {},
}


def config(kind: str) -> Any:
    """A config of that type with small sizes."""
    made = architectures.small(CONFIG_MAPPING[kind], _SIZES, _MORE)
    made.architectures = [CLASSES[kind]]
    return made


def save(folder: Path, kind: str) -> Path:
    """A random model of that type and a tokenizer, in the Hugging Face layout."""
    cls, made = getattr(transformers, CLASSES[kind]), config(kind)
    with torch.device("meta"):
        model = cls._from_config(made)
    if sum(p.numel() for p in model.parameters()) > 20_000_000:
        raise ValueError("too large")
    model = cls._from_config(made, dtype=torch.float32)
    architectures.draw(model, len(kind))
    model.eval().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def inputs(kind: str, model: Any) -> dict[str, Tensor]:
    """Token ids with an image in between, and the pixels of the image, as `model` takes them."""
    return _qwen(model)


def _qwen(model: Any) -> dict[str, Tensor]:
    """For models that take patches of images of any size. Their grid is given in time, height and width."""
    vision = model.config.vision_config
    width, merge = vision.patch_size, vision.spatial_merge_size
    grid = torch.tensor([[1, 2 * merge, 2 * merge]])
    numbers = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * width**2
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(int(grid.prod()), numbers, generator=generator)
    ids = torch.randint(3, 200, (1, 16), generator=generator)
    ids[0, 3], ids[0, 4:8], ids[0, 8] = START_TOKEN, IMAGE_TOKEN, END_TOKEN
    given = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    return given | {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()}
