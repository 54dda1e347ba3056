"""llama.cpp's converter makes the files of vision towers whose tensors the golden tests compare with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fewbit.api import generate
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models.gguf.rows.towers import ROWS
from fewbit.models.gguf.rows.unread_towers import UNREAD
from fewbit.models.gguf.tokenizer import to_metadata
from tests import gguf_files, mmproj_files
from tests.interop import converter

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:mmproj.gguf. its tower for sound is left out"),
    pytest.mark.skipif(not converter.SDIST.exists(), reason="make interop downloads llama.cpp's source"),
]
# Weights of these that the converter rounds to float16 are such already (`mmproj_files.Kind.half`).
KINDS = tuple(mmproj_files.KINDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converter.unpacked(tmp_path_factory.mktemp("llama.cpp"))


def test_every_projector_of_llama_cpp_is_read_or_said(tmp_path: Path) -> None:
    text = converter.projectors(tmp_path)
    names = re.findall(r"\{ PROJECTOR_TYPE_\w+, +\"([^\"]+)\" ?\}", text)
    read = {row.projector for row in ROWS}
    assert len(names) > 50
    assert not read & UNREAD.keys()
    assert set(names) == read | UNREAD.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_towers_are_its_converters(kind: str, source: Path, tmp_path: Path) -> None:
    """`python -m tests.interop.converter towers` writes them. tests/golden compares fewbit's names with them."""
    folder = gguf_files.numbered(mmproj_files.save(tmp_path / "m", kind))
    published = mmproj_files.published(folder, tmp_path / "published", kind)
    converter.convert_tower(source, published, tmp_path / "mmproj.gguf", kind)
    theirs = GgufFile(tmp_path / "mmproj.gguf")
    assert {"digest": gguf_files.digest(theirs), "keys": gguf_files.keys_of(theirs)} == mmproj_files.golden()[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_both_files_of_its_converter_give_the_logits(kind: str, source: Path, tmp_path: Path) -> None:
    folder = mmproj_files.save(tmp_path / "m", kind)
    original = mmproj_files.original(folder)
    published = mmproj_files.published(folder, tmp_path / "published", kind)
    converter.convert_tower(source, published, tmp_path / "mmproj.gguf", kind)
    converter.convert(source, published, tmp_path / "bare.gguf", {})
    bare = GgufFile(tmp_path / "bare.gguf")  # the converter knows tokenizers by hashes of published ones
    rows = bare.entries["token_embd.weight"].shape[0]
    keys = bare.metadata | to_metadata(mmproj_files.tokenizer(kind), rows)
    with GgufWriter(tmp_path / "text.gguf", keys, list(bare.entries.values())) as writer:
        for name in bare.entries:
            writer.add(name, bare.get(name))
    loaded = generate.load(tmp_path / "text.gguf", mmproj=tmp_path / "mmproj.gguf", dtype="float32", device="cpu")
    given = mmproj_files.inputs(kind, original)
    with torch.inference_mode():
        found = loaded(**given).logits
        wanted = original(**given).logits[..., : found.shape[-1]]  # of Gemma, the converter drops rows without a token
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
