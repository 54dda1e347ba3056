"""A model of every architecture becomes the file that llama.cpp's own converter makes of it.

The values come from `convert_hf_to_gguf.py` of llama-cpp-python 0.3.36, by `python -m tests.interop.converter`. All
weights are whole numbers, so the values do not depend on a random generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewbit.formats.containers.gguf import GgufFile
from tests import gguf_files

# Keys that the converter writes though llama.cpp takes the same value without them.
WITHOUT_EFFECT = {
    "attention.sliding_window_pattern",  # of the usual pattern
    "rope.freq_base_swa",  # the usual base
    "nemotron.attention.layer_norm_rms_epsilon",  # its norms subtract the mean
    "rope.scaling.original_context_length",  # without a scaling
    "rope.scaling.type",  # none
    "nextn_predict_layers",  # none
    *(f"granite.ssm.{key}" for key in ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank")),
}


@pytest.mark.parametrize("kind", gguf_files.KINDS)
def test_a_file_is_that_of_llama_cpps_converter(kind: str, tmp_path: Path) -> None:
    folder = gguf_files.numbered(gguf_files.save(tmp_path / "m", kind))
    file, golden = GgufFile(gguf_files.written(folder, tmp_path / "m.gguf")), gguf_files.golden()[kind]
    keys = gguf_files.keys_of(file)
    missing = golden["keys"].keys() - keys.keys() - WITHOUT_EFFECT
    assert not {key for key in missing if key.split(".", 1)[1] not in WITHOUT_EFFECT}
    assert {key: _one(keys[key]) for key in golden["keys"] if key in keys} == {
        key: _one(value) for key, value in golden["keys"].items() if key in keys
    }
    assert gguf_files.digest(file) == golden["digest"]


def _one(value: Any) -> Any:
    """A list of a number for each layer that are all the same means this number."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 and isinstance(value[0], int) else value
