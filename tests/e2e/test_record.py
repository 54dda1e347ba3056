"""`evaluate --record` completes the record and the model card of an output."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

import fewbit as package
from fewbit.api import records
from fewbit.errors import OutputError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.source import locate
from fewbit.plans.plan import Plan, Rule
from tests import gguf_files, models
from tests.e2e.conftest import Fewbit


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.save(tmp_path / "model", "llama")


FEW = ("--length", 32, "--samples", 2)


def test_the_record_and_the_card_have_what_was_measured(
    fewbit: Fewbit, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert fewbit("quantize", model, "-o", out, "--plan", "nf4").code == 0
    answer = fewbit("evaluate", out, "--reference", model, "--text", text, *FEW, "--record", "--json")
    assert answer.code == 0, answer.err
    record = json.loads((out / "fewbit.json").read_text(encoding="utf-8"))
    assert record["evaluation"] == answer.json
    assert record["plan"]["name"] == "nf4"
    kl = answer.json["kl"]["mean"]
    assert f"| KL divergence, nats per token | {kl:.3g} | " in (out / "README.md").read_text(encoding="utf-8")
    assert fewbit("inspect", out).code == 0
    (out / "README.md").write_text("# Mine\n", encoding="utf-8")
    answer = fewbit("evaluate", out, "--text", text, *FEW, "--record")
    assert "note: README.md was edited" in answer.out
    assert (out / "README.md").read_text(encoding="utf-8") == "# Mine\n"
    assert json.loads((out / "fewbit.json").read_text(encoding="utf-8"))["evaluation"]["reference"] is None


def test_a_gguf_file_holds_it_and_its_tensors_stay(fewbit: Fewbit, text: Path, tmp_path: Path) -> None:
    model, out = gguf_files.save(tmp_path / "model", "llama"), tmp_path / "out.gguf"
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(Plan("mine", "gguf", (Rule("*", "q8_0", "rtn"),)).to_json()), encoding="utf-8")
    assert fewbit("quantize", model, "-o", out, "--plan", plan).code == 0
    before = digests(out)
    answer = fewbit("evaluate", out, "--text", text, *FEW, "--record", "--json")
    assert answer.code == 0, answer.err
    assert digests(out) == before
    assert fewbit("inspect", out, "--json").json["made"]["evaluation"] == answer.json
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf", "plan.json"]


def digests(path: Path) -> dict[str, str]:
    file = GgufFile(path)
    return {name: sha256(file.get(name).contiguous().view(-1).numpy().tobytes()).hexdigest() for name in file.entries}


def test_a_model_without_a_record_is_refused_first(fewbit: Fewbit, model: Path, text: Path) -> None:
    for name in (model, "tiny"):
        answer = fewbit("evaluate", name, "--text", text, "--record")
        assert answer.code == 2
        assert "no record of fewbit" in answer.err
    assert not (model / "fewbit.json").exists()


def test_a_record_that_was_killed_is_replaced_too(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package.quantize(model, out, plan="nf4", progress=False)
    for name in (".fewbit.json.01234567.part", ".README.md.89abcdef.part"):
        (out / name).touch()
    package.quantize(model, out, plan="nf4", overwrite=True, progress=False)
    assert not list(out.glob(".*"))


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file can have more bytes, as on a disk that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_takes_no_file_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    package.quantize(model, tmp_path / "out", plan="nf4", progress=False)
    with largest_file(0), pytest.raises(PlanError, match="cannot be"):
        records.check_recorded(locate(tmp_path / "out"))
    records.check_recorded(locate(tmp_path / "out"))


def test_a_record_that_finds_no_room_stays_as_it_was(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package.quantize(model, out, plan="nf4", progress=False)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with largest_file(2048), pytest.raises(OutputError, match=f"{out} could not be written: File too large"):
        records.complete(locate(out), {"evaluation": None})
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
