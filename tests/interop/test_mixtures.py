"""llama.cpp's quantizer gives each tensor the type that our rules give it; the table in tests/golden is what it gave.

python -m tests.interop.test_mixtures          # writes that table anew
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbit.formats.containers.gguf import GgufFile
from fewbit.plans.mixtures import MIXTURES
from tests.golden.mixture_models import EXAMPLES, Example, summed_up
from tests.interop import llama_cpp as peer

pytestmark = [pytest.mark.interop, pytest.mark.skipif(bool(peer.missing()), reason=peer.missing() or "")]

TABLE = Path(__file__).parent.parent / "golden" / "mixtures.json"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_table_is_what_llama_cpp_gives(name: str, tmp_path: Path) -> None:
    assert _types(EXAMPLES[name], tmp_path) == json.loads(TABLE.read_text(encoding="utf-8"))["types"][name]


def test_file_types() -> None:
    import llama_cpp

    table = json.loads(TABLE.read_text(encoding="utf-8"))["file_types"]
    assert table == {name: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}") for name in MIXTURES}


def _types(example: Example, folder: Path) -> dict[str, Any]:
    """Mixture -> plain, and weighed where that differs -> role -> types over the layers, as llama.cpp quantized.

    The iq2 types and iq3_xxs are not quantized without an importance matrix, so some mixtures are weighed only. q1_0
    has no fallback for rows that its blocks do not divide, so it has no types then.
    """
    source, out = folder / "source.gguf", folder / "out.gguf"
    _write(example, source)
    ones = {f"{name}.weight": np.ones(shape[1] * _many(name), np.float32) for name, shape in example.tensors().items()}
    found: dict[str, Any] = {}
    for mixture, entry in MIXTURES.items():
        found[mixture] = {}
        for how, imatrix in (("plain", None), ("weighed", ones)):
            try:
                peer.quantize(source, out, entry.file_type, imatrix)
            except RuntimeError:
                assert how == "plain" or mixture == "q1_0", mixture
                continue
            types = {name.removesuffix(".weight"): entry.type for name, entry in GgufFile(out).entries.items()}
            given = summed_up({name: types[name] for name in example.tensors()})
            if given != found[mixture].get("plain"):
                found[mixture][how] = given
    return found


def _many(name: str) -> int:
    """How many experts a tensor has here. The rules know of one tensor for all of them by its third dimension."""
    return 2 if name.endswith("_exps") else 1


def _write(example: Example, path: Path) -> None:
    """A file of 16-bit tensors with as much metadata as the quantizer asks for."""
    import gguf

    writer = gguf.GGUFWriter(path, example.arch)
    writer.add_context_length(128)
    writer.add_embedding_length(example.width)
    writer.add_block_count(example.layers)
    writer.add_feed_forward_length(example.hidden)
    writer.add_head_count(example.heads)
    writer.add_head_count_kv(example.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_sliding_window(128)
    if example.experts:
        writer.add_expert_count(example.experts)
        writer.add_expert_used_count(1)
    values = np.random.default_rng(0)
    for name, shape in example.tensors().items():
        whole = (_many(name), *shape) if _many(name) > 1 else shape
        writer.add_tensor(f"{name}.weight", values.standard_normal(whole).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    import llama_cpp

    types = {}
    for name, example in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            types[name] = _types(example, Path(folder))
    table = {
        "made_by": f"python -m tests.interop.test_mixtures, with llama-cpp-python {llama_cpp.__version__}",
        "file_types": {name: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}") for name in MIXTURES},
        "types": types,
    }
    lines = json.dumps(table, indent=1).splitlines()
    # A mixture's roles on one line.
    TABLE.write_text(
        re.sub(r"\n {5,}", " ", "\n".join(lines)).replace("{ ", "{").replace("\n    }", "}") + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
