"""mtmd, llama.cpp's library for images, makes the vectors of the original's tower, but for what it is said to change.

Where it computes something else, the original with that change gives its vectors. So fewbit reads these files as the
original has them. docs/gguf.md says what differs.
"""

from __future__ import annotations

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
from tests.interop.test_llama_cpp import opened

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
IMAGE = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))  # one tile


def there(folder: Path, mmproj: Path, kind: str) -> Tensor:
    """mtmd's vectors of the image."""
    text = mmproj_files.text_file(folder, mmproj.with_suffix(".text"), kind)
    (found,) = mtmd.vectors(opened(text, n_ctx=128), mmproj, IMAGE)
    return found


def here(model: Any, mmproj: Path) -> Tensor:
    """The original's vectors of the image, whose size is that of the tower, so that it is not resized."""
    keys = GgufFile(mmproj).metadata
    mean, std = (torch.from_numpy(np.array(keys[f"clip.vision.image_{name}"])).float() for name in ("mean", "std"))
    pixels = ((IMAGE.float() / 255 - mean) / std).permute(2, 0, 1)[None]
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
