"""Keys of a GGUF file: all are shown, and some can have other values in a copy of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit as package
from fewbit.api import convert
from fewbit.api.inspect import inspect
from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from tests import gguf_files, models
from tests.e2e.conftest import Fewbit

EOS, TEMPLATE = "tokenizer.ggml.eos_token_id", "tokenizer.chat_template"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.save(tmp_path_factory.mktemp("keys") / "m", "llama", tie_word_embeddings=True)
    return gguf_files.written(folder, folder.parent / "m.gguf", "q8_0")


def test_all_keys_are_shown(file: Path, fewbit: Fewbit) -> None:
    stored = GgufFile(file).metadata
    shown = fewbit("inspect", file, "--metadata", "--json").json["metadata"]
    assert shown.keys() == stored.keys()
    tokens = stored["tokenizer.ggml.tokens"].tolist()
    assert shown["tokenizer.ggml.tokens"] == {"length": len(tokens), "first": tokens[:8]}
    assert shown["llama.embedding_length"] == 64
    text = fewbit("inspect", file, "--metadata").out
    assert all(key in text for key in stored)
    assert f"{len(tokens):,} values: {tokens[0]!r}" in text
    assert inspect(file).metadata == {}
    with pytest.raises(PlanError, match="is a folder"):
        inspect("tiny", metadata=True)


def test_a_template_and_a_token_are_set(file: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}!é", encoding="utf-8")
    token = load_tokenizer(locate(file)).convert_ids_to_tokens(7)
    keys = ["--set", f"{TEMPLATE}=@{tmp_path / 'chat.jinja'}", "--set", f"{EOS}={token}", "--set", "general.name=a=b"]
    shown = fewbit("convert", file, "--to", "gguf", *keys, "--dry-run", "--json")
    done = fewbit("convert", file, "-o", tmp_path / "new.gguf", "--to", "gguf", *keys)
    assert done.code == 0, done.err
    assert (shown.json["plan"], shown.json["output_bytes"]) == ("copy", GgufFile(tmp_path / "new.gguf").nbytes)
    before, after = GgufFile(file), GgufFile(tmp_path / "new.gguf")
    new = {TEMPLATE: "{{ messages[0]['content'] }}!é", EOS: 7, "general.name": "a=b"}
    assert {key for key in after.metadata if repr(after.metadata[key]) != repr(before.metadata.get(key))} == {*new}
    assert {key: after.metadata[key] for key in new} == new
    assert list(after.entries.values()) == list(before.entries.values())
    assert all(torch.equal(after.get(name), before.get(name)) for name in before.entries)
    made = load_tokenizer(locate(tmp_path / "new.gguf"))
    assert made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!é"
    assert package.load(tmp_path / "new.gguf").config.eos_token_id == 7


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (f"{EOS}=<nothing>", "no such token"),
        (f"{EOS}=99999", "no such token"),
        ("llama.context_lenght=8", "the file has no key llama.context_lenght"),
        ("llama.embedding_length=32", "with these keys the file could not be read"),
        ("llama.context_length=many", "expected an integer"),
        ("llama.rope.freq_base=inf", "expected a number"),
        ("tokenizer.ggml.add_bos_token=yes", "expected true or false"),
        ("tokenizer.ggml.tokens=a", "is a list"),
        (f"{TEMPLATE}={{% if %}}", "chat template has an error in line 1"),
        (f"{TEMPLATE}=@nowhere.jinja", "nowhere.jinja cannot be read"),
        ("general.architecture=qwen2", "cannot be changed"),
        ("general.name", "expected KEY=VALUE"),
    ],
)
def test_what_cannot_be_set_is_refused(pair: str, reason: str, file: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    for place in (("-o", tmp_path / "new.gguf"), ("--dry-run",)):
        done = fewbit("convert", file, *place, "--to", "gguf", "--set", pair)
        assert done.code == 2
        assert reason in done.err
    assert list(tmp_path.iterdir()) == []


def test_keys_are_set_in_copies_only(file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="in a copy of a GGUF file"):
        convert.convert(file, tmp_path / "out", to="dense", set={"general.name": "a"})
    with pytest.raises(PlanError, match="which would be lost"):
        convert.convert(file, file, to="gguf", set={"general.name": "a"}, overwrite=True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general.type": "adapter", "general.architecture": "llama"}, ("is a LoRA adapter", "as --adapter")),
        ({"general.type": "mmproj", "general.architecture": "clip"}, ("tower of a model (mmproj)", "language model")),
        ({"general.architecture": "clip"}, ("tower of a model (mmproj)", "for images, this file is its --mmproj")),
        ({"general.type": "imatrix"}, ("is an importance matrix", "as --imatrix")),
    ],
)
def test_files_that_are_no_models(keys: dict[str, Any], words: tuple[str, ...], tmp_path: Path, fewbit: Fewbit) -> None:
    path = tmp_path / "x.gguf"
    with GgufWriter(path, keys, [Entry("v.blk.0.attn_q.weight", "f32", (4, 4))]) as writer:
        writer.add("v.blk.0.attn_q.weight", torch.zeros(4, 4))
    inspect: list[tuple[Any, ...]] = [] if "tower" in words[0] else [("inspect", path)]  # it says what a tower is for
    for command in (("generate", path, "the"), *inspect, ("quantize", path, "-o", tmp_path / "out")):
        answer = fewbit(*command)
        assert answer.code == 3
        assert all(word in answer.err for word in words), answer.err
