"""What keys of the file of a vision tower, and settings beside it, mean for single projectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fewbit as package
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models import images
from fewbit.models.gguf import processor, towers
from fewbit.models.source import locate, with_tower
from tests import mmproj_files

pytest.importorskip("PIL")
from PIL import Image

from tests.e2e.test_gguf_towers import PROMPT, made

PICTURES = [Image.new("RGB", (40, 50), "teal"), Image.new("RGB", (67, 29), "red")]


def test_a_patch_of_llama_4_in_a_prompt_is_refused() -> None:
    own: Any = transformers.GotOcr2ImageProcessorPil()  # Llama 4's own needs torchvision, and is not reached
    part = processor.without_others(
        transformers.Llama4Processor, image_processor=own, tokenizer=mmproj_files.tokenizer("llama4")
    )
    config = mmproj_files.config("llama4").to_dict()
    with pytest.raises(PlanError, match=r"the prompt has <\|patch\|>, which stands for a part of an image"):
        images.inputs(part, "a <|patch|>", PICTURES[:1], config, chat=False)


def test_an_image_of_exaone_is_marked_as_in_llama_cpp(tmp_path: Path) -> None:
    files = made(tmp_path, "exaone4_5")
    source = with_tower(locate(files.text), files.tower)
    made_of = images.load_processor(source)
    marked = "<vision><|image_pad|></vision>"
    found = [
        images.inputs(made_of, f"{start}{PROMPT}", PICTURES, source.config, chat=False)["input_ids"]
        for start in ("", 2 * marked)
    ]
    assert torch.equal(*found)
    text = made_of.tokenizer.decode(found[0][0])
    assert text.count("<vision>") == text.count("</vision>") == 2
    assert "</vision><vision>" in text


def test_exaone_without_windows_attends_to_the_whole_image(tmp_path: Path) -> None:
    files = made(tmp_path, "exaone4_5")
    text, found = locate(files.text).config, []
    for value in (2, None, 0):
        tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", {"clip.vision.n_wa_pattern": value})
        config = towers.to_config(text, towers.opened(tower, "exaone4"), GgufFile(files.text))
        found.append(config["vision_config"]["fullatt_block_indexes"])
    assert found == [[1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_settings_of_glm_4_6v_are_those_of_glm_4_5v(tmp_path: Path) -> None:
    tower = towers.opened(made(tmp_path, "glm4v_moe").tower, "glm4_moe")
    own: Any = transformers.Glm46VImageProcessorPil  # its arguments are not typed
    own(patch_size=16).save_pretrained(tower.file.path.parent)
    assert processor.images(tower).patch_size == 16


def test_glm_4_without_sections_of_rope_has_no_tower(tmp_path: Path) -> None:
    files = made(tmp_path, "glm4v")
    for value, words in (
        (None, r"it has no glm4\.rope\.dimension_sections, which a Glm4vForConditionalGeneration needs"),
        (np.array([2, 2, 1, 0], np.int32), r"\[2, 2, 1\], which is not half of the 8 columns that RoPE turns"),
    ):
        text = mmproj_files.changed(files.text, tmp_path / "text.gguf", {"glm4.rope.dimension_sections": value})
        with pytest.raises(FormatError, match=words):
            package.load(text, mmproj=files.tower, device="cpu")


@pytest.mark.parametrize("kind", ["glm4v", "glm_ocr"])
def test_the_language_model_of_a_dense_glm_alone(kind: str, tmp_path: Path) -> None:
    """With the block that predicts further tokens, which the files of GLM-OCR have."""
    files = made(tmp_path, kind)
    file = GgufFile(files.text)
    last = {name: file.get(name).clone() for name in file.entries if name.startswith("blk.1.")}
    more = {name.replace("blk.1.", "blk.2."): tensor for name, tensor in last.items()}
    more["blk.2.nextn.eh_proj.weight"] = torch.zeros(64, 128)
    keys = {"glm4.block_count": 3, "glm4.nextn_predict_layers": 1}
    text = mmproj_files.changed(files.text, tmp_path / "text.gguf", keys, more)
    original, given = (
        mmproj_files.original(files.folder),
        mmproj_files.inputs(kind, mmproj_files.original(files.folder)),
    )
    whole = package.load(text, mmproj=files.tower, dtype="float32", device="cpu")
    alone = package.load(text, dtype="float32", device="cpu")
    package.quantize(text, tmp_path / "q8_0.gguf", plan="q8_0", device="cpu", progress=False)
    packed = package.load(tmp_path / "q8_0.gguf", mmproj=files.tower, dtype="float32", device="cpu")
    ids = given["input_ids"][:, 20:]
    with torch.inference_mode():
        for found, wanted, most in (
            (whole(**given), original(**given), 1e-5),
            (alone(ids), original(ids), 1e-5),
            (packed(**given), original(**given), 0.05),
        ):
            assert float((found.logits - wanted.logits).norm() / wanted.logits.norm()) < most


def test_an_activation_of_another_name_is_refused(tmp_path: Path) -> None:
    files = made(tmp_path, "qwen2_vl")
    tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", {"clip.use_gelu": True})
    with pytest.raises(FormatError, match=r"its activation is gelu; that of a Qwen2VLFor.* is quick_gelu"):
        package.load(files.text, mmproj=tower, device="cpu")


@pytest.mark.parametrize("kind", ["glm4v", "kimi_k25", "granite4_vision"])
def test_heads_that_do_not_divide_the_width(kind: str, tmp_path: Path) -> None:
    files = made(tmp_path, kind)
    tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", {"clip.vision.attention.head_count": 7})
    with pytest.raises(FormatError, match=r"embedding_length is \d+, which is no multiple of vision.*head_count, 7"):
        package.load(files.text, mmproj=tower, device="cpu")


@pytest.mark.parametrize("key", ["general.type", "clip.projector_type"])
def test_a_list_in_place_of_a_name(key: str, tmp_path: Path) -> None:
    """It is no name, and NumPy compares each of its entries."""
    files = made(tmp_path, "gemma3")
    for value in ([1, 2], []):
        tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", _arrays({key: value}))
        if key == "general.type":  # general.architecture says what it is
            assert package.load(files.text, mmproj=tower, device="cpu").config.model_type == "gemma3"
        else:
            with pytest.raises(FormatError, match=r"its projector is '\[.*\]', which fewbit does not read"):
                package.load(files.text, mmproj=tower, device="cpu")


def test_a_scale_that_does_not_divide_llama_4s_patches(tmp_path: Path) -> None:
    files = made(tmp_path, "llama4")
    tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", {"clip.vision.projector.scale_factor": 3})
    with pytest.raises(FormatError, match="scale_factor is 3, which does not divide 4 patches"):
        package.load(files.text, mmproj=tower, device="cpu")


def test_minicpm_v_4_6_merges_16_patches_in_one_place(tmp_path: Path) -> None:
    files = made(tmp_path, "minicpmv4_6")
    for keys, words in (
        ({"clip.vision.projector.scale_factor": 2}, r"scale_factor is 2; fewbit reads MiniCPM-V 4\.6 with 4"),
        ({"clip.vision.wa_layer_indexes": np.array([1, 2], np.int32)}, r"\[1, 2\], not the number of one block"),
        ({"clip.vision.wa_layer_indexes": np.array([4], np.int32)}, r"\[4\], not the number of one block"),
    ):
        tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", keys)
        with pytest.raises(FormatError, match=words):
            package.load(files.text, mmproj=tower, device="cpu")


def test_positions_of_kimi_are_a_square(tmp_path: Path) -> None:
    files = made(tmp_path, "kimi_k25")
    for shape in ((4, 8, 48), (8, 4, 48)):
        tensors = {"v.position_embd.weight": torch.ones(shape)}
        tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", tensors=tensors)
        with pytest.raises(FormatError, match=rf"{shape[0]} x {shape[1]} positions, which are no square"):
            package.load(files.text, mmproj=tower, device="cpu")


@pytest.mark.parametrize("found", [5, "abc", [1, 2], [-1, 2, 3], [1 << 40, 1, 1], [2.5, 1, 0], [2, 2, 1], {"a": 1}])
def test_sections_of_a_config_that_are_none(found: Any, tmp_path: Path) -> None:
    files = made(tmp_path, "glm4v")
    model: Any = package.load(files.text, dtype="float32", device="cpu")
    model.dequantize()
    model.save_pretrained(tmp_path / "text")
    mmproj_files.tokenizer("glm4v").save_pretrained(tmp_path / "text")
    place = tmp_path / "text" / "config.json"
    config = json.loads(place.read_text(encoding="utf-8")) | {"mrope_section": found}
    place.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(PlanError, match=r"mrope_section is .*, not 3 integers from 0 with a sum of at most 4"):
        package.quantize(tmp_path / "text", tmp_path / "q.gguf", plan="q8_0", device="cpu", progress=False)


def test_projectors_of_granite_that_feed_no_layer_are_refused(tmp_path: Path) -> None:
    files = made(tmp_path, "granite4_vision")
    changes: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
        ({"granite.deepstack_mapping": None}, {}, "deepstack_mapping is None, not a list"),
        ({"granite.deepstack_mapping": [-1, -1, 1, -1, 2, 3, 4, 4]}, {}, "does not name a layer for each"),
        ({}, {"clip.vision.feature_layer": [6, 5, 5, 3, 5, 5]}, "not name a layer for each|does not read"),
        ({}, {"clip.vision.projector.spatial_offsets": [-1, 1, 3, -1, 0, 0]}, "spatial_offsets is .* does not read"),
        ({}, {"clip.vision.image_grid_pinpoints": [64, 32, 32]}, "not pairs of sizes that 32 divides"),
        ({}, {"clip.vision.image_grid_pinpoints": [64, 127]}, "not pairs of sizes that 32 divides"),
        ({}, {"clip.vision.image_grid_pinpoints": [64, 32 << 20]}, "of at most 64 tiles"),
        ({}, {"clip.vision.image_grid_pinpoints": [64, 0]}, "with numbers below 1"),
        ({}, {"clip.vision.feature_layer": []}, "not a list of at least 1 integers"),
    )
    for spoken, seen, words in changes:
        text = mmproj_files.changed(files.text, tmp_path / "text.gguf", _arrays(spoken))
        tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", _arrays(seen))
        with pytest.raises(FormatError, match=words):
            package.load(text, mmproj=tower, device="cpu")


def _arrays(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value is None else np.array(value, np.int32) for key, value in keys.items()}
