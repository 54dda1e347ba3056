"""Record and model card of what `save_pretrained` and `push_to_hub` of transformers write for packed models."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fewbit
from fewbit.api.push import preview
from fewbit.errors import FormatError
from fewbit.models.describe import describe
from fewbit.models.plugin import quantizer
from fewbit.models.source import locate
from fewbit.report.card import portable
from tests import hub as stand_in
from tests import models
from tests.hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

LOSS = "KL divergence, nats per token"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a measured loss in its record."""
    place = tmp_path_factory.mktemp("saved") / "tiny-4bit"
    fewbit.quantize("tiny", place, plan="rtn-4bit")
    fewbit.evaluate(place, reference="tiny", length=64, samples=4, record=True)
    return place


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "tiny-q8_0.gguf"
    plan = fewbit.Plan("mine", "gguf", fewbit.api.arguments.plan("plan", "q8_0").rules)
    fewbit.quantize("tiny", place, plan=plan.changed(method="rtn"))
    fewbit.evaluate(place, reference="tiny", length=64, samples=4, record=True)
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with stand_in.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        address = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # it has the address
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        yield running


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "fewbit.json").read_text(encoding="utf-8")))


@torch.no_grad()
def change(model: Any) -> None:
    model.model.norm.weight.mul_(1.01)


@pytest.mark.parametrize("by", ["fewbit", "transformers"])
def test_an_unchanged_model_keeps_its_record(by: str, measured: Path, tmp_path: Path) -> None:
    load = fewbit.load if by == "fewbit" else AutoModelForCausalLM.from_pretrained
    load(measured, dtype=torch.float32).save_pretrained(tmp_path)
    assert card(tmp_path) == card(measured)
    assert LOSS in card(tmp_path)
    said, before = record(tmp_path), portable(record(measured))
    assert {**said, "files": None} == {**before, "files": None}
    assert set(said["files"]) == {path.name for path in tmp_path.iterdir()}
    assert preview(tmp_path, "org/again").files.keys() == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("what", ["norm", "config", "precision"])
def test_no_loss_is_claimed_for_a_changed_model(what: str, measured: Path, tmp_path: Path) -> None:
    model = fewbit.load(measured, dtype=torch.float32)
    if what == "norm":
        change(model)
    elif what == "config":
        model.config.rms_norm_eps *= 2
    else:
        with torch.no_grad():
            model.model.norm.weight.add_(1e-7)
    model.save_pretrained(tmp_path)
    said = record(tmp_path)
    assert said["original"] == portable(record(measured))
    assert "evaluation" not in said
    assert said["tensors"] == []
    for words in ("It was not measured", "does not hold for this one", "tiny, quantized, then changed"):
        assert words in card(tmp_path)
    assert LOSS not in card(tmp_path)
    assert "fewbit quantize tiny -o out --plan rtn-4bit" in card(tmp_path)
    assert describe(locate(tmp_path)).made["plan"]["name"] == "rtn-4bit"

    fewbit.load(tmp_path, dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert card(tmp_path / "again") == card(tmp_path)


def test_a_card_follows_what_is_saved_to_its_folder(measured: Path, tmp_path: Path) -> None:
    model = fewbit.load(measured, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert LOSS in card(tmp_path)
    change(model)
    model.save_pretrained(tmp_path)
    assert LOSS not in card(tmp_path)
    edited = card(tmp_path) + "Mine.\n"
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    with pytest.warns(UserWarning, match="was edited, so it stays"):
        model.save_pretrained(tmp_path)
    assert card(tmp_path) == edited


def test_a_model_saved_over_its_own_files(measured: Path, tmp_path: Path) -> None:
    fewbit.load(measured, dtype=torch.float32).save_pretrained(tmp_path)
    fewbit.load(tmp_path, dtype=torch.float32).save_pretrained(tmp_path)
    assert "It may differ" in card(tmp_path)
    assert LOSS not in card(tmp_path)
    assert record(tmp_path)["original"]["evaluation"] == portable(record(measured))["evaluation"]


def test_a_gguf_file_keeps_its_record_or_says_so(gguf: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(tmp_path)
    assert LOSS in card(tmp_path)
    assert "llama-server -m model.gguf" in card(tmp_path)
    before = portable(describe(locate(gguf)).made)
    assert describe(locate(tmp_path / "model.gguf")).made == before
    change(model)
    model.save_pretrained(tmp_path)
    assert LOSS not in card(tmp_path)
    said = describe(locate(tmp_path / "model.gguf")).made
    assert said["original"] == before
    assert "evaluation" not in said


def test_weights_quantized_while_loading(tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tiny = locate("tiny").folder
    with quantizer.serving():
        model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config)
    model.save_pretrained(tmp_path)
    said = card(tmp_path)
    assert "quantized by BitsAndBytesConfig when" in said
    assert "It was not measured" in said
    assert "It has no record of how it was made" in said
    assert "license: apache-2.0" in said
    assert not (tmp_path / "fewbit.json").exists()


def test_a_model_of_another_maker(measured: Path, tmp_path: Path) -> None:
    fewbit.load(measured, dtype=torch.float32).save_pretrained(tmp_path / "their")
    for name in ("fewbit.json", "README.md"):
        (tmp_path / "their" / name).unlink()
    fewbit.load(tmp_path / "their").save_pretrained(tmp_path / "again")
    assert "It was saved from their, and how that was made is not recorded" in card(tmp_path / "again")


def test_what_is_not_packed_gets_no_card(measured: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(locate("tiny").folder).save_pretrained(tmp_path / "plain")
    fewbit.load(measured).dequantize().save_pretrained(tmp_path / "unpacked")
    for name in ("plain", "unpacked"):
        assert not {"README.md", "fewbit.json"} & {path.name for path in (tmp_path / name).iterdir()}


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_an_upload_names_its_repository(by: str, hub: Hub, measured: Path, tmp_path: Path) -> None:
    model = fewbit.load(measured, dtype=torch.float32)
    if by == "push_to_hub":
        model.push_to_hub("org/tiny", tags=["mine"])
    else:
        model.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="org/tiny")
    files = hub.repositories["org/tiny"].files
    said = files["README.md"].decode()
    assert 'from_pretrained("org/tiny")' in said
    assert LOSS in said
    assert "automatically generated" not in said
    assert ("- mine" in said) == (by == "push_to_hub")
    uploaded = json.loads(files["fewbit.json"])
    assert uploaded["evaluation"] == portable(record(measured)["evaluation"])
    assert str(measured.parent) not in files["fewbit.json"].decode()

    change(model)
    model.push_to_hub("org/tiny")
    assert LOSS not in hub.repositories["org/tiny"].files["README.md"].decode()


def test_the_card_of_a_repository_stays_if_edited(hub: Hub, measured: Path) -> None:
    model = fewbit.load(measured, dtype=torch.float32)
    theirs = b"---\nlicense: mit\n---\n# Mine\n"
    hub.repositories["org/tiny"] = stand_in.Repository(private=True, files={"README.md": theirs})
    model.push_to_hub("org/tiny")
    files = hub.repositories["org/tiny"].files
    assert b"# Mine" in files["README.md"]
    assert "fewbit.json" in files


def test_a_pushed_gguf_file_has_its_card(hub: Hub, gguf: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.push_to_hub("org/gguf")
    files = hub.repositories["org/gguf"].files
    assert files.keys() == {"README.md", "model.gguf"}
    assert b"llama-server -hf org/gguf --hf-file model.gguf" in files["README.md"]
    assert LOSS.encode() in files["README.md"]


def test_no_paths_in_a_pushed_gguf_file(hub: Hub, tmp_path: Path) -> None:
    models.save(tmp_path / "private" / "model", "llama", hidden_size=256)
    place = tmp_path / "private" / "model.gguf"
    fewbit.quantize(tmp_path / "private" / "model", place, plan="q8_0", device="cpu", progress=False)
    assert str(tmp_path).encode() in place.read_bytes()
    model: Any = AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name)
    for number in range(2):  # the model itself, then a changed one, whose record has the first in `original`
        model.push_to_hub(f"org/gguf{number}")
        files = hub.repositories[f"org/gguf{number}"].files
        assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
        (tmp_path / f"{number}.gguf").write_bytes(files["model.gguf"])
        made = describe(locate(tmp_path / f"{number}.gguf")).made
        assert made.get("original", made)["model"] == "model"
        change(model)


def test_no_paths_in_a_saved_folder(tmp_path: Path) -> None:
    models.save(tmp_path / "my own" / "model", "llama")
    place = tmp_path / "my own" / "small"
    fewbit.quantize(tmp_path / "my own" / "model", place, plan="rtn-4bit", device="cpu", progress=False)
    assert record(place)["origin"] == str(tmp_path / "my own" / "model")
    model = fewbit.load(place)
    model.config.a_path = f"{tmp_path}/my own/thing"
    (tmp_path / "saved").mkdir()
    theirs = json.dumps({"log": str(tmp_path / "log")})  # nothing that was saved now
    (tmp_path / "saved" / "trainer_state.json").write_text(theirs, encoding="utf-8")
    for _ in range(2):  # unchanged, then changed
        model.save_pretrained(tmp_path / "saved")
        for file in (tmp_path / "saved").iterdir():
            if file.name != "trainer_state.json":
                assert str(tmp_path).encode() not in file.read_bytes(), file
                assert b"my own" not in file.read_bytes(), file
        change(model)
    assert record(tmp_path / "saved")["original"]["origin"] == "model"
    assert (tmp_path / "saved" / "trainer_state.json").read_text(encoding="utf-8") == theirs


def test_what_cannot_be_described_is_not_uploaded(hub: Hub, measured: Path, tmp_path: Path) -> None:
    """The folder has a record that fewbit cannot read, and in which paths cannot be cut."""
    shutil.copytree(measured, tmp_path / "their")
    (tmp_path / "their" / "fewbit.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "their")
    (tmp_path / "fewbit.json").write_text(f'{{"model": "{tmp_path}"}}', encoding="utf-8")
    with pytest.raises(FormatError, match=r"nothing was uploaded to org/tiny: .*fewbit\.json is not a valid record"):
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/tiny")
    assert hub.repositories["org/tiny"].files == {}


def test_a_copy_of_a_model_is_described_too(measured: Path, tmp_path: Path) -> None:
    copy.deepcopy(fewbit.load(measured, dtype=torch.float32)).save_pretrained(tmp_path)
    assert LOSS in card(tmp_path)
