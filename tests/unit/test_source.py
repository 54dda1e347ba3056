"""Where models come from: folders, the demo model, the Hub; and in what state their files are."""

from __future__ import annotations

import errno
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from fewbit import FormatError, PlanError
from fewbit.formats.containers import safetensors
from fewbit.models import scales, smollm2, source, stated

CONFIG = {"model_type": "llama", "hidden_size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that has what `locate` looks at."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, place / "model.safetensors")
    return place


def test_a_folder_is_what_it_holds(folder: Path) -> None:
    found = source.locate(folder)
    assert found == source.Source(str(folder), folder, (folder / "model.safetensors",), folder)
    assert found.config == CONFIG
    assert found.quantization is None


def test_a_home_is_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert source.locate("~/model").folder == folder


def test_a_relative_path_is_a_folder_before_a_hub_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert source.locate(f"{folder.parent.name}/model").files[0].samefile(folder / "model.safetensors")


def test_quantized_is_what_says_so(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}), encoding="utf-8"
    )
    assert source.locate(folder).quantization == {"quant_method": "gptq"}


def test_the_config_given_out_is_a_fresh_one(folder: Path) -> None:
    found = source.locate(folder)
    found.config["hidden_size"] = 9
    assert found.config == CONFIG


def test_sizes_are_the_models_or_its_texts(folder: Path) -> None:
    inner = {"max_position_embeddings": 64, "vocab_size": 9}
    for config, context, rows in (
        ({}, 2048, None),
        ({"text_config": inner}, 64, 9),
        ({**inner, "n_positions": 1}, 64, 9),
    ):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert (source.locate(folder).context, source.locate(folder).rows) == (context, rows)
    for wrong in (0, -1, "64", True):
        (folder / "config.json").write_text(
            json.dumps({"text_config": {**inner, "max_position_embeddings": wrong}}), encoding="utf-8"
        )
        with pytest.raises(FormatError, match=r"config\.json: max_position_embeddings is .*, not an integer above 0"):
            _ = source.locate(folder).context


def test_sizes_of_a_language_model_inside_are_found(folder: Path) -> None:
    text = {"vocab_size": 300, "max_position_embeddings": 256}
    for config in (
        {"llm_config": text},
        {"thinker_config": {"text_config": text}},
        {"text_config": text, "vocab_size": 9},
    ):
        (folder / "config.json").write_text(json.dumps({"model_type": "x", **config}), encoding="utf-8")
        assert (source.locate(folder).context, source.locate(folder).rows) == (256, 300)
    (folder / "config.json").write_text(
        '{"model_type": "gemma3", "text_config": {"vocab_size": 300}}', encoding="utf-8"
    )
    assert (source.locate(folder).stated_context, source.locate(folder).rows) == (131072, 300)


def test_vocabularies_of_folders_are_compared(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": 49152}', encoding="utf-8")
    with pytest.raises(PlanError, match=r"the vocabulary of tiny has 4096 entries, and that of .* 49152"):
        stated.check_vocabularies("tiny", folder)
    for unknown in ("smollm2", "org/model", folder / "model.gguf", folder.parent, folder):
        stated.check_vocabularies(unknown, folder)
        stated.check_vocabularies(folder, unknown)


def test_shards_come_in_the_order_of_their_names(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_file({f"weight.{i}": torch.zeros(2)}, folder / name)
    where = {f"weight.{i}": names[i] for i in (2, 0, 1)}
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    assert [file.name for file in source.locate(folder).files] == names


def test_safetensors_are_preferred_to_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never looked at")
    assert source.locate(folder, safetensors_only=True).files == (folder / "model.safetensors",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pickle_becomes_safetensors_once(dtype: torch.dtype, folder: Path) -> None:
    weight = torch.arange(6.0, dtype=dtype).reshape(2, 3)
    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("not carried", encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    torch.save({"whole": weight, "turned": weight.T, "tied": weight}, folder / "pytorch_model.bin")
    found = source.locate(folder)
    assert found.folder != folder
    assert found.name == str(folder)
    tensors, _ = safetensors.read_file(found.files[0])
    assert tensors.keys() == {"whole", "turned", "tied"}
    assert all(tensors[name].dtype == dtype for name in tensors)
    assert torch.equal(tensors["whole"], weight)
    assert torch.equal(tensors["turned"], weight.T)
    assert torch.equal(tensors["tied"], weight)
    assert found.config == CONFIG
    assert (found.folder / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    written = found.files[0].stat().st_mtime_ns
    assert source.locate(folder) == found
    assert found.files[0].stat().st_mtime_ns == written


def test_another_pickle_is_converted_anew(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    first = source.locate(folder).folder
    torch.save({"weight": torch.ones(3)}, folder / "pytorch_model.bin")
    second = source.locate(folder)
    assert second.folder != first
    assert torch.equal(safetensors.read_file(second.files[0])[0]["weight"], torch.ones(3))


@pytest.mark.parametrize("held", [[torch.zeros(2)], {"a": {"b": torch.zeros(2)}}], ids=["list", "nested"])
def test_a_pickle_of_something_else_is_refused(held: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin could not be read as plain tensors"):
        source.locate(folder)


class NoTensor:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("never",)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_object_in_a_pickle_is_named_and_not_made(zipped: bool, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    held = {"a": torch.zeros(2), "b": NoTensor()}
    torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"plain tensors: Unsupported global: GLOBAL (builtins\.)?print") as caught:
        source.locate(folder)
    assert "weights_only" not in str(caught.value)


def test_the_demo_model_goes_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "folder", lambda: folder)
    assert source.locate("smollm2").folder == folder


def test_the_hub_is_asked_for_safetensors_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert source.locate("org/model").folder == folder
    (only,) = asked
    assert only[0] == "org/model"
    assert "*.safetensors" in only[1]
    assert not any(".bin" in pattern or ".gguf" in pattern for pattern in only[1])


def test_the_hub_is_asked_for_a_pickle_as_a_last_resort(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").unlink()
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if any(pattern.startswith("pytorch_model") for pattern in allow_patterns):
            torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert source.locate("org/model").files[0].name == "model.safetensors"
    assert len(asked) == 2


def test_what_awq_folded_is_downloaded_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, an adapter could not be moved between the model and its original."""
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(source, "snapshot_download", download)
    source.locate("org/model")
    assert any(fnmatch(scales.FILE, pattern) for pattern in asked)


def test_a_pickle_that_would_be_refused_is_not_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").unlink()
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(FormatError):
        source.locate("org/model", safetensors_only=True)
    assert not any("pytorch_model" in pattern for pattern in asked)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR])
def test_a_cache_of_the_hub_that_cannot_be_written(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise OSError(number, os.strerror(number), "/home/hub")

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(PlanError, match=r"(?s)cannot save it in the cache of the Hub: .* \(/home/hub\).*Set HF_HOME"):
        source.locate("org/model")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("No connection.\nMore of the same.")

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(PlanError) as refusal:
        source.locate("org/model")
    assert "org/model" in refusal.value.message
    assert refusal.value.message.endswith("No connection.")
    assert "tiny" in refusal.value.hint


def test_a_gguf_file_that_is_not_there_is_called_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("No connection.")

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(PlanError, match=r"model out/model\.gguf: no such file here"):
        source.locate("out/model.gguf")


@pytest.mark.parametrize("name", ["gpt2", "distilbert-base-uncased", "openai-community/gpt2"])
def test_a_hub_name_needs_no_owner(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        raise LocalEntryNotFoundError("No connection.")

    monkeypatch.setattr(source, "snapshot_download", download)
    for find in (source.locate, source.outlined):
        with pytest.raises(PlanError, match="no such folder here, and the Hub could not be reached: No connection"):
            find(name)
    assert asked == [name, name]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tinny", "Did you mean tiny?"),
        ("Tiny", "Did you mean tiny?"),
        ("smollm", "Did you mean smollm2?"),
        ("org/tinny", "Check the name"),
        ("gpt2", "Check the name"),
    ],
)
def test_the_name_of_an_own_model_is_suggested(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("No connection.")

    monkeypatch.setattr(source, "snapshot_download", download)
    for find in (source.locate, source.outlined):
        with pytest.raises(PlanError) as raised:
            find(name)
        assert raised.value.hint.startswith(hint)


@pytest.mark.parametrize("name", ["./a", "/a/b", "a/b/c", "two words", "a/", "~/nowhere", ""])
def test_what_cannot_be_a_hub_name_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises((PlanError, FormatError)):
        source.locate(name)


def test_a_file_may_be_replaced_by_its_own_tensors(tmp_path: Path) -> None:
    """Its tensors are mapped from it, so it must stay until the new one is complete."""
    path = tmp_path / "model.safetensors"
    safetensors.write_file(path, {"a": torch.arange(4096.0), "b": torch.ones(3)})
    read, _ = safetensors.read_file(path)
    safetensors.write_file(path, {name: tensor for name, tensor in read.items() if name == "a"})
    again, _ = safetensors.read_file(path)
    assert list(again) == ["a"]
    assert torch.equal(again["a"], torch.arange(4096.0))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
