"""GGUF files of a model whose activation has numbers of its own in each layer (Apertus): a file has them as keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.api import generate, quantize
from fewbit.errors import FewbitError, FormatError
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.plans.plan import find
from tests import gguf_files, models

NAME = "model.layers.1.mlp.act_fn.alpha_p"
KEY = "xielu.alpha_p"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, whose numbers differ by layer and by name."""
    path = gguf_files.save(tmp_path_factory.mktemp("apertus") / "m", "apertus")
    weights = load_file(path / "model.safetensors")
    for place, name in enumerate(sorted(name for name in weights if "act_fn" in name)):
        weights[name] = torch.full_like(weights[name], 0.25 + 0.125 * place if "eps" not in name else -1e-3 * place)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    quantize.quantize(folder, folder.parent / "m.gguf", plan=find("q8_0").changed(method="rtn"))
    return folder.parent / "m.gguf"


def test_the_keys_are_the_numbers_of_all_layers(folder: Path, file: Path) -> None:
    weights, found = load_file(folder / "model.safetensors"), GgufFile(file).metadata
    for each in ("alpha_p", "alpha_n", "beta", "eps"):
        own = [float(weights[f"model.layers.{layer}.mlp.act_fn.{each}"]) for layer in range(2)]
        assert found[f"xielu.{each}"].dtype == np.float32
        assert found[f"xielu.{each}"].tolist() == pytest.approx(own)
    assert not any("xielu" in name for name in GgufFile(file).entries)


def test_a_file_is_quantized_anew_with_the_same_numbers(file: Path, tmp_path: Path) -> None:
    quantize.quantize(file, tmp_path / "q4.gguf", plan=find("q4_0").changed(method="rtn"))
    before, after = GgufFile(file).metadata, GgufFile(tmp_path / "q4.gguf").metadata
    for each in ("alpha_p", "alpha_n", "beta", "eps"):
        assert np.array_equal(before[f"xielu.{each}"], after[f"xielu.{each}"])


def test_a_number_that_was_changed_is_saved(file: Path, tmp_path: Path) -> None:
    loaded, ids = generate.load(file, dtype=torch.float32), gguf_files.ids()
    with torch.no_grad():
        loaded.get_parameter(NAME).fill_(1.5)
    loaded.save_pretrained(tmp_path)
    path = tmp_path / "model.gguf"
    assert GgufFile(path).metadata[KEY].tolist() == [GgufFile(file).metadata[KEY][0], 1.5]
    assert torch.equal(models.logits(generate.load(path, dtype=torch.float32), ids), models.logits(loaded, ids))


@pytest.mark.parametrize("value", [None, np.array([0.5], np.float32), np.array([1, 2], np.int32)])
def test_a_list_that_does_not_fit_is_refused(value: np.ndarray | None, file: Path, tmp_path: Path) -> None:
    whole = GgufFile(file)
    keys = {key: each for key, each in whole.metadata.items() if key != KEY} | ({} if value is None else {KEY: value})
    with GgufWriter(tmp_path / "m.gguf", keys, list(whole.entries.values())) as writer:
        for name in whole.entries:
            writer.add(name, whole.get(name))
    with pytest.raises(FormatError, match=r"xielu\.alpha_p has no number of layer [01]"):
        generate.load(tmp_path / "m.gguf")


def test_a_checkpoint_without_a_number_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    copied = tmp_path / "m"
    copied.mkdir()
    for each in folder.iterdir():
        (copied / each.name).write_bytes(each.read_bytes())
    del weights["model.layers.1.mlp.act_fn.beta"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FewbitError, match=r"act_fn\.beta"):
        quantize.quantize(copied, tmp_path / "m.gguf", plan=find("q8_0").changed(method="rtn"))
