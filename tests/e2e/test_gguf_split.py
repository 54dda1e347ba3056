"""Models split over several GGUF files: written, read by the name of any of them, and downloaded."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbit.api import convert, generate, quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import gguf_parts
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models import source
from fewbit.pipeline import blocks
from fewbit.plans.plan import find
from tests import gguf_files, models
from tests.e2e.conftest import Fewbit

PLAN = find("q8_0").changed(method="rtn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("split") / "m", "llama")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return Path(quantize.quantize(folder, folder.parent / "whole.gguf", plan=PLAN).out)


@pytest.fixture(scope="module")
def parts(whole: Path, folder: Path) -> list[Path]:
    limit = whole.stat().st_size // 3
    done = quantize.quantize(folder, folder.parent / "parts" / "x.gguf", plan=PLAN, max_shard=limit)
    found = sorted(Path(done.out).parent.iterdir())
    assert done.out == str(found[0])
    assert all(part.stat().st_size <= limit for part in found)
    return found


def logits(path: Path) -> torch.Tensor:
    return models.logits(generate.load(path, dtype=torch.float32), gguf_files.ids())


def test_parts_are_the_model(whole: Path, parts: list[Path]) -> None:
    count = len(parts)
    assert [part.name for part in parts] == [f"x-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert count in (3, 4, 5)
    assert list(GgufFile(parts[0]).entries.values()) == list(GgufFile(whole).entries.values())
    for place in (parts[0], parts[-1], parts[0].parent):
        assert torch.equal(logits(place), logits(whole))
    loaded = AutoModelForCausalLM.from_pretrained(parts[0].parent, gguf_file=parts[1].name, dtype=torch.float32)
    assert torch.equal(models.logits(loaded, gguf_files.ids()), logits(whole))


def test_the_command_replaces_all_parts(folder: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    def made(*options: object) -> set[str]:
        done = fewbit("quantize", folder, "-o", tmp_path / "o.gguf", "--plan", "q8_0", "--method", "rtn", *options)
        assert done.code == 0, done.err
        return {re.sub(r"-of-\d+", "", path.name) for path in tmp_path.iterdir()}

    few = made("--max-shard", "60kB")
    refused = fewbit("quantize", folder, "-o", tmp_path / "o.gguf", "--plan", "q8_0", "--max-shard", "40kB")
    assert refused.code == 2
    assert "00001-of-" in refused.err
    assert len(made("--max-shard", "20kB", "--overwrite")) > len(few) > 1
    assert made("--max-shard", "1GB", "--overwrite") == {"o.gguf"}


def test_a_conversion_splits_and_joins(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    done = convert.convert(whole, tmp_path / "x.gguf", to="gguf", max_shard="40kB")
    assert Path(done.out).name.startswith("x-00001-of-")
    joined = Path(convert.convert(parts[1], tmp_path / "joined.gguf", to="gguf").out)
    for path in (Path(done.out), joined):
        assert torch.equal(logits(path), logits(whole))
    assert not [key for key in GgufFile(joined).metadata if key.startswith("split.")]
    with pytest.raises(PlanError, match="which would be lost"):
        convert.convert(parts[1], parts[0], to="gguf", overwrite=True)


def test_a_folder_is_not_split(folder: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="this output is a folder"):
        quantize.quantize(folder, tmp_path / "out", plan="nf4", max_shard="1GB")
    with pytest.raises(PlanError, match="max_shard='much'"):
        quantize.quantize(folder, tmp_path / "out.gguf", plan=PLAN, max_shard="much")
    with pytest.raises(PlanError, match="this output is a folder"):
        quantize.preview(folder, plan="nf4", max_shard="1GB")
    with pytest.raises(PlanError, match="this output is a folder"):
        convert.preview(whole, to="dense", max_shard="1GB")


def test_a_dry_run_counts_the_files(
    folder: Path, parts: list[Path], whole: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    limit = whole.stat().st_size // 3
    shown = fewbit("quantize", folder, "--plan", "q8_0", "--dry-run", "--max-shard", limit, "--json")
    assert shown.code == 0, shown.err
    assert shown.json["files"] in (len(parts) - 1, len(parts))  # without the record, which is in the first file
    assert f"in {shown.json['files']} files" in fewbit(
        "quantize", folder, "--plan", "q8_0", "--dry-run", "--max-shard", limit
    ).out.replace("\n", " ")
    assert quantize.preview(folder, plan=PLAN).files == quantize.preview(folder, plan=PLAN, max_shard="1GB").files == 1
    assert convert.preview(folder, to="gguf", max_shard="60kB").files > 2
    split = Path(convert.convert(whole, tmp_path / "x.gguf", to="gguf", max_shard=limit).out)
    made = len([*split.parent.iterdir()])
    assert convert.preview(whole, to="gguf", max_shard=limit).files == made > 1
    assert convert.preview(split, to="gguf").files == 1


def test_too_many_files_are_refused_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_parts, "MOST", 2)
    monkeypatch.setattr(blocks, "quantize_blocks", None)  # calling it fails
    with pytest.raises(PlanError, match="files are more than 2"):
        quantize.quantize(folder, tmp_path / "o.gguf", plan=PLAN, max_shard="40kB")
    with pytest.raises(PlanError, match="files are more than 2"):
        quantize.preview(folder, plan=PLAN, max_shard="40kB")


def test_a_missing_part_is_named(parts: list[Path], tmp_path: Path) -> None:
    for part in parts:
        shutil.copy(part, tmp_path)
    (tmp_path / parts[1].name).unlink()
    for name in (parts[0].name, parts[2].name):
        with pytest.raises(FormatError, match=f"{parts[1].name} is missing"):
            generate.load(tmp_path / name)


def test_a_file_of_the_hub_brings_its_parts(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.extend([repo, *allow_patterns])
        return str(parts[0].parent)

    monkeypatch.setattr(source, "snapshot_download", download)
    found = source.locate(f"org/model/{parts[1].name}")
    assert (found.gguf, found.files, found.hosted) == (str(parts[0]), tuple(parts), True)
    assert asked == ["org/model", *(part.name for part in parts)]
    with pytest.raises(PlanError, match=r"org/model has no file other\.gguf"):
        source.locate("org/model/other.gguf")
    for name, what in (("org/model/../x.gguf", "no such file"), ("org/x.gguf/y", "no such folder")):
        with pytest.raises(PlanError, match=what):
            source.locate(name)


def test_transformers_gets_the_parts_from_the_hub(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    from fewbit.models.plugin.patch_gguf_config import gguf_path

    asked: list[str] = []

    def cached(repo: str, file: str) -> str:
        asked.append(file)
        return str(parts[0].with_name(file))

    monkeypatch.setattr(hub, "cached_file", cached)
    assert gguf_path("org/model", parts[2].name, {}) == str(parts[2])
    assert set(asked) == {part.name for part in parts}
