"""llama.cpp's converter makes the same tensors and keys of a model of every architecture that fewbit writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.formats.containers.gguf import GgufFile
from tests import gguf_files
from tests.interop import converter

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not converter.SDIST.exists(), reason="make interop downloads llama.cpp's source"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converter.unpacked(tmp_path_factory.mktemp("llama.cpp"))


@pytest.mark.parametrize("kind", gguf_files.KINDS)
def test_the_golden_values_are_its_converters(kind: str, source: Path, tmp_path: Path) -> None:
    """`python -m tests.interop.converter` writes them. tests/golden compares fewbit's files with them."""
    folder = gguf_files.numbered(gguf_files.save(tmp_path / "m", kind))
    converter.convert(source, folder, tmp_path / "theirs.gguf", converter.PUBLISHED.get(kind, {}))
    theirs = GgufFile(tmp_path / "theirs.gguf")
    assert {"digest": gguf_files.digest(theirs), "keys": gguf_files.keys_of(theirs)} == gguf_files.golden()[kind]
