"""How an adapter that PEFT trains over a GGUF file names that file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers.integrations import peft as integration

import fewbit as package
from fewbit.errors import PlanError
from fewbit.models import scales
from fewbit.models.adapters import refit
from fewbit.models.adapters.attach import quiet
from tests import gguf_files, models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_gguf_adapters import SHAPE


@pytest.mark.parametrize("saver", ["peft", "transformers"])
@pytest.mark.parametrize("several", [False, True])
def test_what_peft_saves_names_the_file(
    saver: str, several: bool, tmp_path: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its folder has several; a folder with one names it, and transformers takes the folder too."""
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)  # as in test_peft.py
    place, out = tmp_path / "files", tmp_path / "adapter"
    place.mkdir()
    file = gguf_files.written(models.save(tmp_path / "model", "llama", **SHAPE), place / "a.gguf", "q8_0")
    if several:
        gguf_files.written(
            models.save(tmp_path / "other", "llama", **SHAPE | {"hidden_size": 512}), place / "b.gguf", "q8_0"
        )
    loaded, config = package.load(file), LoraConfig(r=2, target_modules=["q_proj"])
    assert loaded.name_or_path == str(place)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")
        if saver == "peft":
            get_peft_model(loaded, config).save_pretrained(str(out))
        else:
            loaded.add_adapter(config)
            loaded.save_pretrained(out)
    base = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert base == str(file if several else place)
    package.load(base, adapter=out)
    if several:
        with pytest.raises(PlanError, match=rf"is an adapter for another model \({file}\)"):
            package.load(place / "b.gguf", adapter=out)
        other = package.load(place / "b.gguf")
        assert refit._named(other, LoraConfig(base_model_name_or_path=str(place / "b.gguf")))
        assert not refit._named(other, LoraConfig(base_model_name_or_path=base))
        assert refit._base(LoraConfig(base_model_name_or_path=base)) == file
        found, known = refit._folded(file), scales.of_model(other)
        assert found is not None
        assert known is not None
        assert found.digest == known.digest
        assert fewbit("generate", base, "Once", "--adapter", out, "--max-new-tokens", 2).code == 0


def test_each_adapter_names_the_file_beside_other_weights(tmp_path: Path) -> None:
    """The folder names the weights in safetensors. PEFT fills in the name of an adapter that was added later."""
    place, out = models.save(tmp_path / "model", "llama", **SHAPE), tmp_path / "adapters"
    file = gguf_files.written(place, place / "a.gguf", "q8_0")
    assert package.load(place).name_or_path == package.load(file).name_or_path
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")
        adapted = get_peft_model(package.load(file), LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.save_pretrained(str(out))
    for folder in (out, out / "second"):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == str(file)
