"""transformers' auto classes and pipelines on a folder with a GGUF model and its vision tower."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import fewbit as package
from fewbit.errors import PlanError
from tests import mmproj_files

pytest.importorskip("PIL")
from PIL import Image  # after the check

from tests.e2e.test_gguf_towers import PROMPT, Files, made

EXACT: dict[str, Any] = {"dtype": "float32", "device_map": "cpu"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return made(tmp_path_factory.mktemp("auto model é"), "gemma3", "q8_0")


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"])
def test_an_auto_class_loads_the_whole_model(name: str, files: Files) -> None:
    folder = files.text.parent
    ours = package.load(folder, dtype="float32", device="cpu")
    found = getattr(transformers, name).from_pretrained(folder, **EXACT)
    inputs = mmproj_files.inputs("gemma3", ours)
    assert type(found) is type(ours)
    with torch.inference_mode():
        assert torch.equal(found(**inputs).logits, ours(**inputs).logits)
    shown = package.load(files.text, dtype="float32", device="cpu")  # the tower is for that load alone
    assert type(shown).__name__ == "Gemma3ForCausalLM"


def test_a_language_model_alone_has_no_tower(files: Files, tmp_path: Path) -> None:
    said = r"text\.gguf is a language model of type gemma3_text, and AutoModelForImageTextToText needs a vision tower"
    with pytest.raises(PlanError, match=said):
        AutoModelForImageTextToText.from_pretrained(files.text.parent, gguf_file="text.gguf")
    shutil.copy(files.text, tmp_path)
    with pytest.raises(PlanError, match=said):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_folders_of_transformers_are_read_as_before(files: Files) -> None:
    found = AutoModelForImageTextToText.from_pretrained(files.folder, **EXACT)
    assert torch.equal(found.lm_head.weight, mmproj_files.original(files.folder).lm_head.weight)
    for more in ({}, {"use_fast": False}, {"trust_remote_code": True, "revision": "main"}):
        made_of = AutoProcessor.from_pretrained(files.folder, padding_side="left", **more)
        assert (type(made_of).__name__, made_of.tokenizer.padding_side) == ("Gemma3Processor", "left")


def test_an_argument_of_a_processor_is_not_dropped(files: Files) -> None:
    with pytest.raises(PlanError, match="from GGUF files, without padding_side, size"):
        AutoProcessor.from_pretrained(files.text.parent, size={"height": 8, "width": 8}, padding_side="left")


def test_a_pipeline_takes_the_folder(files: Files) -> None:
    pipe: Any = transformers.pipeline("image-text-to-text", model=str(files.text.parent), device="cpu")
    picture = Image.new("RGB", (40, 50), "red")
    wanted = package.generate(files.text.parent, PROMPT, images=[picture], max_new_tokens=4, device="cpu")
    found = pipe(images=picture, text=f"<start_of_image>{PROMPT}", max_new_tokens=4, do_sample=False)
    assert found[0]["generated_text"].endswith(wanted.text)
