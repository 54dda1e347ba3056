"""Classes without the output head of a GGUF file, or with another head, load as from any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import fewbit as package
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.nn.layers import QLinear
from tests import gguf_files


@pytest.fixture(scope="module", params=[("llama", False), ("llama", True), ("gpt2", True)], ids=str)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, tied = request.param
    place = tmp_path_factory.mktemp("heads")
    return gguf_files.written(
        gguf_files.save(place / "m", family, tie_word_embeddings=tied, pad_token_id=0), place / "m.gguf", "q8_0"
    )


def load(kind: Any, file: Path, **options: Any) -> Any:
    return kind.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options).eval()


def test_a_base_model_is_that_of_the_causal_lm(file: Path) -> None:
    whole, base, ids = load(AutoModelForCausalLM, file), load(AutoModel, file), gguf_files.ids()
    assert any(isinstance(module, QLinear) for module in base.modules())
    with torch.no_grad():
        expected = whole.base_model(ids).last_hidden_state
        torch.testing.assert_close(base(ids).last_hidden_state, expected, rtol=0, atol=0)
    base.save_pretrained(file.parent / "saved")  # with the head
    again = package.load(file.parent / "saved" / "model.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_new_head_is_initialized(kind: Any, file: Path, tmp_path: Path) -> None:
    whole, model, ids = load(AutoModelForCausalLM, file), load(kind, file, num_labels=3), gguf_files.ids()
    with torch.no_grad():
        found = model(ids).logits
        expected = whole.base_model(ids).last_hidden_state
        assert found.shape[-1] == 3
        assert found.isfinite().all()
        torch.testing.assert_close(model.base_model(ids).last_hidden_state, expected, rtol=0, atol=0)
    with pytest.raises(PlanError, match=r"GGUF has no name for (score|classifier)"):
        model.save_pretrained(tmp_path / "saved")
    model.dequantize().save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("plan", ["rtn-4bit", "w4a16", "q8_0"])
def test_a_class_with_another_prefix_is_refused(plan: str, tmp_path: Path) -> None:
    """transformers loads an unquantized folder into this class with a warning and random weights."""
    out = tmp_path / ("m.gguf" if plan == "q8_0" else "m")
    package.quantize("tiny", out, plan=plan)
    with pytest.raises(FormatError) as raised:
        AutoModelForQuestionAnswering.from_pretrained(tmp_path if plan == "q8_0" else out)
    assert "LlamaForQuestionAnswering names its base model 'transformer', and the checkpoint names it 'model'" in str(
        raised.value
    )
    assert "AutoModelForTokenClassification" in raised.value.hint


def test_a_base_model_needs_all_of_its_tensors(file: Path, tmp_path: Path) -> None:
    whole = GgufFile(file)
    entries = [entry for entry in whole.entries.values() if entry.name != "blk.1.ffn_down.weight"]
    with GgufWriter(tmp_path / "m.gguf", whole.metadata, entries) as writer:
        for entry in entries:
            writer.add(entry.name, whole.get(entry.name))
    for kind in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(FormatError, match=r"the tensor blk\.1\.ffn_down\.weight is missing"):
            load(kind, tmp_path / "m.gguf")


def test_packed_embeddings_are_not_resized(file: Path) -> None:
    model = load(AutoModelForCausalLM, file)
    size = model.get_input_embeddings().num_embeddings
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    with pytest.raises(PlanError, match=r"packed embeddings \(q8_0\) cannot be resized") as raised:
        model.resize_token_embeddings(size + 8)
    assert "model.dequantize()" in raised.value.hint
    plain = model.dequantize()
    plain.resize_token_embeddings(size + 8)
    assert plain(gguf_files.ids()).logits.shape[-1] == size + 8


@pytest.mark.parametrize("tied", [True, False])
def test_packed_embeddings_are_no_other_parameters(tied: bool, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "llama", tie_word_embeddings=tied)
    package.quantize(folder, tmp_path / "m.gguf", plan="q8_0")
    model = load(AutoModelForCausalLM, tmp_path / "m.gguf")
    packed = [model.num_parameters(exclude_embeddings=without) for without in (False, True)]
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) < packed[1]
    plain = model.dequantize()
    assert packed == [plain.num_parameters(exclude_embeddings=without) for without in (False, True)]
