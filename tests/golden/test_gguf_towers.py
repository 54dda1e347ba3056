"""A vision tower of every kind is read from the file that llama.cpp's own converter makes of it.

The keys and digests are those of files by llama-cpp-python 0.3.36 (`python -m tests.interop.converter towers`). The
tensors of a file are made here, by fewbit's names and orders, from weights that are whole numbers. If the digest is
that of the converter's file, the file is the converter's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit.api import generate
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.gguf.rows.towers import ROWS
from tests import gguf_files, mmproj_files, multimodal

pytestmark = pytest.mark.filterwarnings("ignore:mmproj.gguf. its tower for sound is left out")
# Entries of the encoder's config that may differ: what is not used, an alias, a number for videos only
DIFFERENT = {
    "llava": {"num_hidden_layers", "projection_dim"},
    "smolvlm": {"model_type"},
    "qwen2_5_vl": {"tokens_per_second"},
    "kimi_k25": {"init_pos_emb_height"},  # published, for the converter; transformers names it otherwise
}


@pytest.mark.parametrize("kind", mmproj_files.KINDS)
def test_a_tower_file_is_that_of_its_converter(kind: str, tmp_path: Path) -> None:
    folder = gguf_files.numbered(mmproj_files.save(tmp_path / "m", kind))
    file = GgufFile(mmproj_files.tower_file(folder, tmp_path / "mmproj.gguf", kind))
    assert gguf_files.digest(file) == mmproj_files.golden()[kind]["digest"]


@pytest.mark.parametrize("kind", mmproj_files.KINDS)
def test_two_files_give_the_original_logits(kind: str, tmp_path: Path) -> None:
    folder = mmproj_files.save(tmp_path / "m", kind)
    original, row = mmproj_files.original(folder), mmproj_files.row_of(kind)
    text = mmproj_files.text_file(folder, tmp_path / "text.gguf", kind)
    tower = mmproj_files.tower_file(folder, tmp_path / "mmproj.gguf", kind)
    loaded = generate.load(text, mmproj=tower, dtype="float32", device="cpu")
    assert type(loaded).__name__ == row.cls
    one, other = (model.config.vision_config.to_dict() for model in (original, loaded))
    assert {key for key in one | other if one.get(key) != other.get(key)} == DIFFERENT.get(kind, set())
    given = mmproj_files.inputs(kind, original)
    with torch.inference_mode():
        wanted, found = original(**given).logits, loaded(**given).logits
        changed = {name: value.flip(-1) if name == "pixel_values" else value for name, value in given.items()}
        assert float((loaded(**changed).logits - wanted).norm() / wanted.norm()) > 1e-2
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in mmproj_files.KINDS if mmproj_files.row_of(kind).swapped])
def test_older_files_exchange_up_and_down(kind: str, tmp_path: Path) -> None:
    folder = mmproj_files.save(tmp_path / "m", kind)
    original = mmproj_files.original(folder)
    text = mmproj_files.text_file(folder, tmp_path / "text.gguf", kind)
    made = mmproj_files.tower_file(folder, tmp_path / "made.gguf", kind, older=True)
    assert GgufFile(made).entries["v.blk.0.ffn_down.weight"].shape[1] == 48
    qwen = kind in ("qwen2_vl", "qwen2_5_vl")  # their script wrote no width, and a table of zeros
    keys = {"clip.vision.feed_forward_length": 0} if qwen else {}
    more = {"v.position_embd.weight": torch.zeros(10, 10)} if qwen else {}
    tower = mmproj_files.changed(made, tmp_path / "mmproj.gguf", keys, more)
    loaded = generate.load(text, mmproj=tower, dtype="float32", device="cpu")
    given = mmproj_files.inputs(kind, original)
    with torch.inference_mode():
        wanted, found = original(**given).logits, loaded(**given).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_older_files_of_llama_4_name_a_norm_otherwise(tmp_path: Path) -> None:
    folder = mmproj_files.save(tmp_path / "m", "llama4")
    original = mmproj_files.original(folder)
    text = mmproj_files.text_file(folder, tmp_path / "text.gguf", "llama4")
    made = GgufFile(mmproj_files.tower_file(folder, tmp_path / "made.gguf", "llama4"))
    norms = [name for name in made.entries if ".attn_post_norm." in name]
    renamed = {name.replace("attn_post_norm", "ln2"): made.get(name).clone() for name in norms}
    tower = mmproj_files.changed(made.path, tmp_path / "mmproj.gguf", {}, {**renamed, **dict.fromkeys(norms)})
    loaded = generate.load(text, mmproj=tower, dtype="float32", device="cpu")
    given = mmproj_files.inputs("llama4", original)
    with torch.inference_mode():
        wanted, found = original(**given).logits, loaded(**given).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_every_row_has_a_case() -> None:
    rows = [mmproj_files.row_of(kind) for kind in mmproj_files.KINDS]
    assert {(row.projector, row.model_type) for row in rows} == {(row.projector, row.model_type) for row in ROWS}
    assert {case.type for case in mmproj_files.KINDS.values() if case.given is None} <= multimodal.WITH_IMAGE
