"""What fewbit writes, the package gguf reads, and the other way round; names are those of its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, get_tensor_name_map
from transformers import AutoConfig

from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.models.gguf.names import routes
from tests import gguf_files

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "flag": True,
    "whole": 7,
    "negative": -7,
    "large": 1 << 40,
    "real": 0.5,
    "text": "ü\n",
    "strings": ["a", "", "日本"],
    "whole numbers": [1, -2, 3],
    "reals": [0.5, 1.5],
    "flags": [True, False],
}


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    path, blocks = tmp_path / "m.gguf", torch.randint(0, 255, (4, 68), dtype=torch.uint8)
    entries = [Entry("q", "q8_0", (4, 64)), Entry("f", "f32", (3, 5)), Entry("h", "f16", (7,))]
    tensors = {"q": blocks, "f": torch.randn(3, 5), "h": torch.randn(7).half()}
    with GgufWriter(path, METADATA, entries, alignment=64) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    reader = GGUFReader(path)
    for key, value in METADATA.items():
        field = reader.get_field(key)
        assert field is not None
        assert field.contents() == value
    assert reader.alignment == 64
    for found in reader.tensors:
        assert np.array_equal(found.data, tensors[found.name].numpy())
        assert found.shape.tolist() == [*reversed(next(e.shape for e in entries if e.name == found.name))]


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    path, blocks = tmp_path / "m.gguf", np.random.default_rng(0).integers(0, 255, (4, 36), dtype=np.uint8)
    writer = GGUFWriter(path, "llama")
    writer.add_bool("flag", True)
    writer.add_uint8("small", 200)
    writer.add_int64("negative", -(1 << 40))
    writer.add_float64("real", 0.1)
    writer.add_string("text", "ü\n")
    writer.add_array("strings", ["a", "", "日本"])
    writer.add_array("numbers", [1, -2, 3])
    values = np.arange(15, dtype=np.float32).reshape(3, 5)
    writer.add_tensor("f", values)
    writer.add_tensor("q", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufFile(path)
    assert found.metadata["flag"] is True
    assert [found.metadata[key] for key in ("small", "negative", "real", "text")] == [200, -(1 << 40), 0.1, "ü\n"]
    assert found.metadata["strings"].tolist() == ["a", "", "日本"]
    assert found.metadata["numbers"].tolist() == [1, -2, 3]
    assert found.entries["q"] == Entry("q", "q4_0", (4, 64))
    assert np.array_equal(found.get("f").numpy(), values)
    assert np.array_equal(found.get("q").numpy(), blocks)


@pytest.mark.parametrize("family", gguf_files.FAMILIES)
def test_names_are_those_of_its_tables(family: str, tmp_path: Path) -> None:
    config: Any = AutoConfig.from_pretrained(gguf_files.save(tmp_path / "m", family))
    arch = {"mistral": "LLAMA"}.get(family, family.upper())
    table = get_tensor_name_map(MODEL_ARCH[arch], config.num_hidden_layers)
    for theirs, route in routes(config).items():
        if (family, theirs.partition(".")[0]) != ("gemma2", "lm_head"):  # it is tied, and has no name of its own
            assert table.get_name(theirs, (".weight", ".bias")) == route.name
