"""Tokens that the embedding has no row for are found before any work, by every verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

import fewbit
from fewbit.errors import FormatError, PlanError
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.plugin import quantizer
from fewbit.pipeline import blocks
from fewbit.report import text as report
from fewbit.texts.calibration import Calibration
from tests import models

Place = tuple[Path, Path]
VERBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "quantize": lambda m, data, out: fewbit.quantize(m, out, calibration=Calibration(str(data), 2, 16)),
    "imatrix": lambda m, data, out: fewbit.imatrix(
        m, out.with_suffix(".gguf"), calibration=Calibration(str(data), 2, 16)
    ),
    "generate": lambda m, data, out: fewbit.generate(m, "the", chat=True, max_new_tokens=1),
    "evaluate": lambda m, data, out: fewbit.evaluate(m, text=str(data), length=16),
    "compare": lambda m, data, out: fewbit.compare(m, plans=["nf4"], text=str(data), length=16),
    "merge": lambda m, data, out: fewbit.merge(m, m.parent / "adapter", out, text=str(data), length=16),
    "finetune": lambda m, data, out: fewbit.finetune(m, out, data=str(data), tuning=Tuning(steps=1, length=128)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A model whose tokenizer got two tokens that the embedding was never resized for, and a text of chats."""
    folder = models.save(
        tmp_path_factory.mktemp("ids") / "m", "llama", chat=models.CHAT.replace("<assistant>", "<|new|>")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|filler|>", "<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    data = folder.parent / "chats.jsonl"
    chat = [
        {"role": "user", "content": f"the model <|new|> {models.sentences(1)}"},
        {"role": "assistant", "content": "a"},
    ]
    data.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(8)), encoding="utf-8")
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    return folder, data


@pytest.mark.parametrize("verb", VERBS)
def test_a_token_without_a_row_is_named(verb: str, place: Place, tmp_path: Path) -> None:
    if verb in ("finetune", "merge"):
        pytest.importorskip("peft")
    with pytest.raises(FormatError, match=r"token '<\|new\|>' has the id \d+, and the model's embedding has 288 rows"):
        VERBS[verb](*place, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_check_after_writing_is_foreseen(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FIRST_WORDS", "The <|new|>")
    monkeypatch.setattr(blocks, "quantize_blocks", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(FormatError, match=r"token '<\|new\|>' has the id"):
        fewbit.quantize(place[0], tmp_path / "out", plan="nf4")


def test_a_reference_with_fewer_rows_is_named(place: Place, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(20), encoding="utf-8")
    fewer = models.save(tmp_path / "fewer", "llama", vocab_size=280)
    whole = models.save(tmp_path / "whole", "llama")
    with pytest.raises(PlanError, match=r"fewer has 280 entries, and that of .*whole 288"):
        fewbit.evaluate(whole, reference=fewer, text=str(text), length=16)


def test_padding_needs_no_row_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = models.save(tmp_path / "m", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.save_pretrained(folder)
    data = [models.sentences(count) for count in (1, 2, 3, 4)]
    done = fewbit.finetune(
        folder, tmp_path / "out", data=data, tuning=Tuning(steps=2, length=64, batch=2, held_out=0.25)
    )
    assert done.steps == 2


def test_a_token_without_a_row_is_named_on_load(place: Place) -> None:
    config = GPTQConfig(bits=4, dataset=["the <|new|> model " * 40], group_size=32, model_seqlen=16)
    with quantizer.serving(), pytest.raises(FormatError, match=r"token '<\|new\|>' has the id"):
        AutoModelForCausalLM.from_pretrained(place[0], quantization_config=config)
