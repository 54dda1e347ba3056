"""What is known of the model that an output was made from, for the output's card."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.models.provenance import provenance
from fewbit.models.source import locate
from tests import models


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A model as the Hub's cache has it."""
    return models.save(tmp_path / "models--org--a-model" / "snapshots" / "0123", "llama")


def test_the_metadata_of_the_card_are_taken(snapshot: Path) -> None:
    head = "license: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage:\n- de\n- en\ndatasets: x\n"
    (snapshot / "README.md").write_text(f"---\n{head}---\n# It\n", encoding="utf-8")
    assert provenance(locate(snapshot)) == {
        "model": "org/a-model",
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
        "language": ["de", "en"],
        "pipeline_tag": "text-generation",
    }


@pytest.mark.parametrize("card", ["# It\n", "---\n: [broken\n---\n", "---\n- a list\n---\n", ""])
def test_a_card_without_metadata_is_no_error(card: str, snapshot: Path) -> None:
    (snapshot / "README.md").write_text(card, encoding="utf-8")
    assert provenance(locate(snapshot)) == {"model": "org/a-model", "pipeline_tag": "text-generation"}


def test_a_folder_like_a_name_of_the_hub_is_no_model_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save(tmp_path / "org" / "model", "llama")
    monkeypatch.chdir(tmp_path)
    assert provenance(locate("org/model"))["model"] is None
    assert provenance(locate("tiny")) == {
        "model": None,
        "license": "apache-2.0",
        "language": "en",
        "pipeline_tag": "text-generation",
    }


def test_the_task_is_that_of_the_config(snapshot: Path) -> None:
    source = locate(snapshot)
    for key, task in (("vision_config", "image-text-to-text"), ("audio_config", "audio-text-to-text")):
        config = snapshot / "config.json"
        before = config.read_text(encoding="utf-8")
        config.write_text(before.replace("{", f'{{"{key}": {{}},', 1), encoding="utf-8")
        assert provenance(source)["pipeline_tag"] == task
        config.write_text(before, encoding="utf-8")
