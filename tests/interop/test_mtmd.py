"""mtmd, llama.cpp's library for images, makes the vectors of the original's tower, but for what it is said to change.

Where it computes something else, the original with that change gives its vectors. So fewbit reads these files as the
original has them. docs/gguf.md says what differs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings

from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from tests import mmproj_files
from tests.interop import mtmd
from tests.interop.llama_cpp import opened

pytest.importorskip("llama_cpp", reason="make interop installs llama-cpp-python")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
PATCH = mmproj_files.PATCH
IMAGE = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))  # one tile


def there(folder: Path, mmproj: Path, kind: str, image: Tensor = IMAGE) -> Tensor:
    """mtmd's vectors of an image."""
    text = mmproj_files.text_file(folder, mmproj.with_suffix(".text"), kind)
    (found,) = mtmd.vectors(opened(text, n_ctx=128), mmproj, image)
    return found


def pixels_of(mmproj: Path, image: Tensor = IMAGE) -> Tensor:
    """What the original sees of an image that is not resized, [3, height, width]."""
    keys = GgufFile(mmproj).metadata
    mean, std = (torch.from_numpy(np.array(keys[f"clip.vision.image_{name}"])).float() for name in ("mean", "std"))
    return ((image.float() / 255 - mean) / std).permute(2, 0, 1)


def here(model: Any, mmproj: Path) -> Tensor:
    """The original's vectors of the image, whose size is that of the tower, so that it is not resized."""
    pixels = pixels_of(mmproj)[None]
    sizes = {"image_sizes": torch.tensor([[32, 32]])} if "LightOn" in type(model).__name__ else {}
    with torch.inference_mode():
        found = model.get_image_features(pixel_values=pixels, **sizes)
        vectors = found.get("pooler_output")
        if vectors is None:
            vectors = [model.multi_modal_projector(found.last_hidden_state.flatten(0, 1))]
        return torch.cat(list(vectors))  # of each image


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", ["gemma3", "lighton_ocr"])
def test_the_vectors_of_an_image(kind: str, tmp_path: Path) -> None:
    folder = mmproj_files.save(tmp_path / "m", kind)
    mmproj = mmproj_files.tower_file(folder, tmp_path / "mmproj.gguf", kind)
    assert distance(there(folder, mmproj, kind), here(mmproj_files.original(folder), mmproj)) < 1e-3


def _pairs(pixels: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """GLM: patches of two frames, in squares of four."""
    sizes = (2, 3, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
    patches = torch.stack([pixels] * 2).view(sizes).permute(2, 5, 3, 6, 1, 0, 4, 7)
    return {"pixel_values": patches.reshape(rows * columns, -1), "image_grid_thw": torch.tensor([[1, rows, columns]])}


def _single(pixels: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Kimi K2.5: patches."""
    patches = pixels.view(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4).reshape(-1, 3, PATCH, PATCH)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, columns]])}


def _strip(pixels: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """MiniCPM-V 4.6: patches beside each other."""
    patches = pixels.view(3, rows, PATCH, columns, PATCH).permute(0, 2, 1, 3, 4).reshape(1, 3, PATCH, -1)
    return {"pixel_values": patches, "target_sizes": torch.tensor([[rows, columns]], dtype=torch.int32)}


_PATCHES = {"glm4v": _pairs, "glm4v_moe": _pairs, "glm_ocr": _pairs, "kimi_k25": _single, "minicpmv4_6": _strip}


@pytest.mark.parametrize("kind", _PATCHES)
def test_the_vectors_of_an_image_of_any_size(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = (8, 8) if kind == "minicpmv4_6" else (8, 12)
    usual = mmproj_files.KINDS["minicpmv4_6"]  # mtmd knows 70 x 70 positions of it only
    larger = replace(usual, vision={**usual.vision, "image_size": 70 * PATCH})
    monkeypatch.setitem(mmproj_files.KINDS, "minicpmv4_6", larger)
    folder = mmproj_files.save(tmp_path / "m", kind)
    made = mmproj_files.tower_file(folder, tmp_path / "made.gguf", kind)
    # MiniCPM cuts larger images than this, and others do not use it
    mmproj = mmproj_files.changed(made, tmp_path / "mmproj.gguf", {"clip.vision.image_size": 8 * PATCH})
    size, generator = (rows * PATCH, columns * PATCH, 3), torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        given = _PATCHES[kind](pixels_of(mmproj, image), rows, columns)
        want = torch.cat(list(mmproj_files.original(folder).get_image_features(**given).pooler_output))
    assert len(want) >= 4
    assert distance(there(folder, mmproj, kind, image), want) < 1e-3


def test_the_vectors_of_tiles_for_several_layers(tmp_path: Path) -> None:
    """Granite 4 Vision: an image of two tiles. The four vectors before them are of an overview, which is resized."""
    folder = mmproj_files.save(tmp_path / "m", "granite4_vision")
    mmproj = mmproj_files.tower_file(folder, tmp_path / "mmproj.gguf", "granite4_vision")
    image = torch.randint(0, 256, (32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels = pixels_of(mmproj, image)
    tiles = torch.stack([torch.zeros_like(pixels[..., :32]), pixels[..., :32], pixels[..., 32:]])[None]
    with torch.inference_mode():
        found = mmproj_files.original(folder).get_image_features(tiles, image_sizes=torch.tensor([[32, 64]]))
    by_layer = [vectors for _, (vectors,) in sorted(found.deepstack_features, key=lambda each: each[0])]
    got = there(folder, mmproj, "granite4_vision", image)
    for one, other in zip(got.chunk(len(by_layer), dim=1), by_layer, strict=True):
        assert distance(one[4:], other[4:]) < 1e-3


def class_last(patches: Tensor, token: Tensor, positions: Tensor) -> Tensor:
    """What enters a tower that has the token of the class after the patches [1, N, K], with the positions in order."""
    return torch.cat([patches, token.view(1, 1, -1)], dim=1) + positions.view(1, -1, token.shape[-1])


def test_internvl_has_other_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of the class comes last in mtmd, and first in the file's table of positions."""
    folder = mmproj_files.save(tmp_path / "m", "internvl")
    mmproj = mmproj_files.tower_file(folder, tmp_path / "mmproj.gguf", "internvl")
    got, original = there(folder, mmproj, "internvl"), mmproj_files.original(folder)
    assert distance(got, here(original, mmproj)) > 0.02

    def changed(own: Any, pixels: Tensor, **_: Any) -> Tensor:
        found = class_last(own.patch_embeddings(pixels), own.cls_token, own.position_embeddings)
        return found.roll(1, dims=1)  # the original drops the first vector

    monkeypatch.setattr(InternVLVisionEmbeddings, "forward", changed)
    assert distance(got, here(original, mmproj)) < 1e-3


def test_llava_has_other_positions_and_a_block_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mtmd also drops the first patch in place of the class, and runs all blocks of the file but one."""
    folder = mmproj_files.save(tmp_path / "m", "llava")
    mmproj = mmproj_files.tower_file(folder, tmp_path / "mmproj.gguf", "llava")
    got, original = there(folder, mmproj, "llava"), mmproj_files.original(folder)
    assert distance(got, here(original, mmproj)) > 0.5

    def changed(own: Any, pixels: Tensor, **_: Any) -> Tensor:
        patches = own.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return class_last(patches, own.class_embedding, own.position_embedding.weight)

    monkeypatch.setattr(CLIPVisionEmbeddings, "forward", changed)
    original.config.vision_feature_layer -= 1
    assert distance(got, here(original, mmproj)) < 1e-3


def test_llama4_lacks_a_norm_and_has_another_order(tmp_path: Path) -> None:
    """mtmd has no place for the converter's name of the norm before MLPs, and lists columns of vectors, not rows."""
    folder = mmproj_files.save(tmp_path / "m", "llama4")
    mmproj, older = mmproj_files.tower_file(folder, tmp_path / "mmproj.gguf", "llama4"), tmp_path / "older.gguf"
    file = GgufFile(mmproj)
    names = {name: name.replace("attn_post_norm", "ln2") for name in file.entries}
    entries = [entry._replace(name=names[entry.name]) for entry in file.entries.values()]
    with GgufWriter(older, file.metadata, entries) as writer:
        for name, other in names.items():
            writer.add(other, file.get(name))
    original = mmproj_files.original(folder)
    want, columns = here(original, mmproj), [0, 2, 1, 3]
    assert distance(there(folder, mmproj, "llama4")[columns], want) > 0.2
    got = there(folder, older, "llama4")
    assert distance(got, want) > 0.2
    assert distance(got[columns], want) < 2e-3
