"""GGUF files of models whose layers have other numbers of heads, and values of another width than keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbit.api import generate
from fewbit.errors import FormatError
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.models.gguf import config
from tests import gguf_files, models


def changed(path: Path, out: Path, keys: dict[str, Any], *more: Entry) -> Path:
    """A copy of a file with other keys and further tensors of ones."""
    file = GgufFile(path)
    entries = [*file.entries.values(), *more]
    with GgufWriter(out, file.metadata | keys, entries) as writer:
        for entry in entries:
            writer.add(entry.name, torch.ones(entry.shape) if entry in more else file.get(entry.name))
    return out


def written(kind: str, tmp_path: Path) -> Path:
    return gguf_files.written(gguf_files.save(tmp_path / "m", kind), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("mimo_v2_flash", {"num_key_value_heads": 1, "v_head_dim": 8, "attention_value_scale": 0.7}),
        ("laguna", {"num_attention_heads_per_layer": [4, 6, 6, 2, 4], "gating": "per-head"}),
        ("laguna-element", {"num_attention_heads_per_layer": [4, 4], "gating": "per-element"}),
    ],
)
def test_a_file_gives_the_entries_of_its_heads(kind: str, entries: dict[str, Any], tmp_path: Path) -> None:
    found = config.to_config(GgufFile(written(kind, tmp_path)))
    assert {key: found[key] for key in entries} == entries


def test_windows_without_a_list_are_in_the_usual_layers(tmp_path: Path) -> None:
    whole = GgufFile(written("laguna", tmp_path))
    keys = {key: value for key, value in whole.metadata.items() if not key.endswith("window_pattern")}
    with GgufWriter(tmp_path / "usual.gguf", keys, list(whole.entries.values())) as writer:
        for name in whole.entries:
            writer.add(name, whole.get(name))
    found = config.to_config(GgufFile(tmp_path / "usual.gguf"))["layer_types"]
    assert found == ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"]


def test_heads_of_blocks_behind_the_last_layer_are_left_out(tmp_path: Path) -> None:
    path, ids = written("mimo_v2_flash", tmp_path), gguf_files.ids()
    keys = {
        "mimo2.block_count": 6,
        "mimo2.nextn_predict_layers": 1,
        "mimo2.attention.head_count_kv": np.array([1, 2, 2, 2, 1, 2], np.int32),
        "mimo2.attention.sliding_window_pattern": np.array([0, 1, 1, 1, 0, 1], np.int32),
    }
    more = changed(path, tmp_path / "more.gguf", keys, Entry("blk.5.nextn.enorm.weight", "f32", (64,)))
    found, wanted = (generate.load(each, dtype=torch.float32) for each in (more, path))
    assert found.config.num_hidden_layers == 5
    assert torch.equal(models.logits(found, ids), models.logits(wanted, ids))


@pytest.mark.parametrize(
    ("kind", "key", "value", "reason"),
    [
        ("mimo_v2_flash", "mimo2.attention.head_count_kv", [1, 2, 2, 1, 1], "must have 2 times as many as others"),
        ("mimo_v2_flash", "mimo2.attention.head_count_kv", [1, 2, 2, 2], "no list of 5 numbers above 0"),
        ("mimo_v2_flash", "mimo2.attention.sliding_window_pattern", [0, 1, 1], "has 3 layers, not 5"),
        ("laguna", "laguna.attention.head_count", [4, 6, 6, 2], "no list of 5 numbers above 0"),
        ("laguna", "laguna.attention.head_count", [4, 6, 6, 3, 4], "cannot have 4 heads with 2 key-value heads"),
    ],
)
def test_lists_that_do_not_fit_are_refused(kind: str, key: str, value: Any, reason: str, tmp_path: Path) -> None:
    path = changed(written(kind, tmp_path), tmp_path / "other.gguf", {key: np.array(value, np.int32)})
    with pytest.raises(FormatError, match=reason):
        config.to_config(GgufFile(path))
