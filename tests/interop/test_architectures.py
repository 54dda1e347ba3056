"""llama.cpp's converter makes the same tensors and keys of a model of every architecture that fewbit writes."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fewbit.api import generate
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models.gguf.architectures import MISSING, REFUSED, TYPES
from fewbit.models.gguf.tokenizer import to_tokenizer
from tests import gguf_files, models
from tests.interop import converter

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not converter.SDIST.exists(), reason="make interop downloads llama.cpp's source"),
]


# Vocabularies of llama.cpp's tests that fewbit refuses, and the texts of the others whose ids differ: llama.cpp does
# not normalize text to NFC, as the original does.
OTHER_KINDS = {"bert-bge", "falcon"}
NOT_NORMALIZED = {"qwen35": 3}


def test_its_own_vocabularies_give_the_same_ids(tmp_path: Path) -> None:
    tested = set()
    for path in converter.vocabularies(tmp_path):
        name = path.name.removeprefix("ggml-vocab-").removesuffix(".gguf")
        if name in OTHER_KINDS:
            with pytest.raises(FormatError):
                to_tokenizer(GgufFile(path))
            continue
        tokenizer = to_tokenizer(GgufFile(path))
        texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        lines = Path(f"{path}.out").read_text(encoding="utf-8").split("\n")
        wanted = [[int(word) for word in line.split()] for line in lines]
        found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        differing = [text for text, a, b in zip(texts, found, wanted, strict=False) if a != b]
        assert len(differing) == NOT_NORMALIZED.get(name, 0), (name, differing)
        tested.add(name)
    assert {"gemma-4", "deepseek-coder", "deepseek-llm", "llama-bpe", "qwen2", "phi-3"} <= tested


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converter.unpacked(tmp_path_factory.mktemp("llama.cpp"))


def test_every_type_that_both_have_is_in_a_table(source: Path) -> None:
    """The page of architectures says of each type that llama.cpp's converter and transformers have what fewbit does."""
    (classes,) = (
        ast.literal_eval(each.value)
        for each in ast.parse((source / "conversion" / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(each, ast.AnnAssign) and ast.unparse(each.target) == "TEXT_MODEL_MAP" and each.value
    )
    both = {kind for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if cls in classes}
    assert len(both) > 90
    named = TYPES.keys() | REFUSED.keys() | MISSING.keys()
    configs = {kind: CONFIG_MAPPING[kind] for kind in both}
    texts = {kind: (config.sub_configs or {}).get("text_config", config) for kind, config in configs.items()}
    types = {getattr(text, "model_type", kind) for kind, text in texts.items()}  # one is AutoConfig
    assert types - named == set()
    assert not TYPES.keys() & (REFUSED.keys() | MISSING.keys())


@pytest.mark.parametrize("kind", gguf_files.KINDS)
def test_the_golden_values_are_its_converters(kind: str, source: Path, tmp_path: Path) -> None:
    """`python -m tests.interop.converter` writes them. tests/golden compares fewbit's files with them."""
    folder = gguf_files.numbered(gguf_files.save(tmp_path / "m", kind))
    converter.convert(source, folder, tmp_path / "theirs.gguf", converter.PUBLISHED.get(kind, {}))
    theirs = GgufFile(tmp_path / "theirs.gguf")
    assert {"digest": gguf_files.digest(theirs), "keys": gguf_files.keys_of(theirs)} == gguf_files.golden()[kind]


# Without "original_context_length", which the converter does not write for this type
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": models.CONTEXT,
}
_READ: list[tuple[str, dict[str, Any]]] = [
    # The converter does not write that the logits of this one have no cap, and the usual one is 30
    *((kind, {}) for kind in gguf_files.SAME if kind != "gemma4_text-wide"),
    ("minicpm3", {"rope_parameters": _LONGROPE}),
]


@pytest.mark.parametrize(("kind", "changes"), _READ, ids=lambda case: case if isinstance(case, str) else None)
def test_files_of_its_converter_give_the_original_logits(
    kind: str, changes: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    folder = gguf_files.save(tmp_path / "m", kind, **changes)
    wanted = models.logits(models.original(folder), ids := gguf_files.ids())
    converter.convert(source, folder, tmp_path / "theirs.gguf", converter.PUBLISHED.get(kind, {}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="theirs.gguf", dtype=torch.float32)
    found = models.logits(loaded, ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_factors_that_it_multiplies_into_weights_are_read_there(source: Path, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "falcon_h1", tie_word_embeddings=False, **gguf_files.FACTORS)
    with pytest.raises(PlanError, match=r"_multiplier = 1\.0; this model has"):
        gguf_files.header_of(folder)
    wanted = models.logits(models.original(folder), ids := gguf_files.ids())
    keys = gguf_files.header_of(gguf_files.save(tmp_path / "p", "falcon_h1", tie_word_embeddings=False)).metadata
    converter.convert(source, folder, tmp_path / "theirs.gguf", converter.PUBLISHED["falcon_h1"])
    theirs = GgufFile(tmp_path / "theirs.gguf")  # without a tokenizer
    with GgufWriter(tmp_path / "whole.gguf", {**keys, **theirs.metadata}, list(theirs.entries.values())) as writer:
        for name in theirs.entries:
            writer.add(name, theirs.get(name))
    found = models.logits(generate.load(tmp_path / "whole.gguf", dtype=torch.float32), ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
