"""`fewbit compare` end to end: rows measured in processes of their own, failures that cost a row, and reuse."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fewbit
from fewbit.api import compare, compare_worker
from fewbit.errors import FormatError, OutputError, PlanError
from fewbit.measure.comparison import Comparison, Event
from tests import models
from tests.e2e.conftest import Fewbit

SMALL: dict[str, Any] = {"samples": 2, "length": 64}
FLAGS = ("--samples", 2, "--length", 64)


@pytest.fixture
def misfit(tmp_path: Path) -> Path:
    """A plan file with groups that do not divide tiny's rows."""
    path = tmp_path / "misfit.json"
    rule = {"match": "*", "scheme": "int4-g512-sym", "method": "rtn"}
    path.write_text(json.dumps({"name": "misfit", "format": "gptq", "rules": [rule]}), encoding="utf-8")
    return path


def test_rows_are_measured_reused_and_added_to(fewbit: Fewbit, tmp_path: Path, misfit: Path) -> None:
    out = tmp_path / "report"
    first = fewbit("compare", "tiny", "--plans", f"bf16,nf4,{misfit}", "-o", out, *FLAGS)
    assert first.code == 0
    # Each phase has a line. A slow one has more, with its steps.
    said = dict.fromkeys(" ".join(line.split()[1:3]) for line in first.err.splitlines())
    assert [*said] == [
        *("bf16 measuring", "bf16 done", "nf4 quantizing", "nf4 measuring", "nf4 done"),
        *("misfit quantizing", "misfit failed:"),
    ]
    assert "misfit failed: " in first.out
    assert "groups of 512 do not divide 256 columns; and 1 more" in " ".join(first.out.split())
    read = Comparison.read(out)
    assert [(row.plan, row.status, row.reused) for row in read.rows] == [
        ("bf16", "done", False),
        ("nf4", "done", False),
        ("misfit", "failed", False),
    ]
    assert read.calibration is None  # neither plan needs any
    original, nf4, _ = read.rows
    check_original(original)
    check_nf4(nf4)
    assert original.weights is not None
    assert nf4.weights is not None
    assert nf4.weights.at_rest < 0.4 * original.weights.at_rest

    again = fewbit("compare", "--plans", "bf16,nf4,int8", "-o", out, *FLAGS, "--json")
    assert again.code == 0
    assert Comparison.from_json(again.json) == Comparison.read(out)
    assert [(r["plan"], r["reused"]) for r in again.json["rows"]] == [("bf16", True), ("nf4", True), ("int8", False)]
    kept = Comparison.read(out)
    assert [replace(row, reused=False) for row in kept.rows[:2]] == [original, nf4]
    assert not list(out.parent.rglob("reference-*"))


def check_original(row: Any) -> None:
    """What must hold of the row that the others are compared with."""
    weights = row.weights
    assert (row.format, row.what, row.bits_per_weight) == ("safetensors", "the original, bfloat16", 16.0)
    assert weights.canonical == weights.parameters == 2 * 7_344_384
    assert weights.resident > 0
    assert weights.at_rest == weights.parameters + sum(weights.buffers.values())
    assert row.loss.kl.value == 0
    assert row.loss.same_top.value == 1
    assert set(row.loss.drift) == {0.0}
    assert row.quantizing is None
    assert row.errors == {}


def check_nf4(row: Any) -> None:
    """What must hold of a row that was quantized."""
    weights = row.weights
    assert (row.format, row.what) == ("bnb", "nf4-b64-dq by rtn")
    # To the byte what schemes say; rotary frequencies are no weights, and in no file.
    assert weights.at_rest - weights.canonical == sum(n for name, n in weights.buffers.items() if "freq" in name)
    assert weights.at_rest - weights.parameters == sum(weights.buffers.values())
    assert weights.buffers["scales"] > 0
    assert row.disk_bytes > weights.canonical
    assert 0 < row.loss.kl.low <= row.loss.kl.value <= row.loss.kl.high < 0.5
    assert 0.5 < row.loss.same_top.value < 1
    assert len(row.loss.drift) == 8
    assert all(0 < drift < 0.2 for drift in row.loss.drift)
    assert len(row.errors) == 56
    assert all(0 < error < 0.1 for error in row.errors.values())
    assert row.quantizing.seconds > 0
    assert row.generating.process >= row.loading.growth > 0
    for timing in (row.speed.prefill, row.speed.decode):
        assert 0 < timing.low <= timing.median <= timing.high
        assert timing.runs >= 6
        assert timing.low <= timing.interval.low <= timing.median <= timing.interval.high <= timing.high
    assert row.sample


def test_a_killed_process_costs_its_row_and_is_tried_again(tmp_path: Path) -> None:
    seen: list[Event] = []

    def kill(event: Event) -> None:
        seen.append(event)
        if event.plan == "nf4" and event.state == "measuring" and event.pid:
            os.kill(event.pid, signal.SIGKILL)

    done = fewbit.compare(plans=["nf4", "int8"], progress=kill, **SMALL)
    assert [(row.plan, row.status) for row in done.rows] == [("nf4", "failed"), ("int8", "done")]
    assert {(event.state, event.unit) for event in seen if event.done} == {
        ("quantizing", "block"),
        ("measuring", "run"),
        ("measuring", "window"),
    }
    assert done.rows[0].reason == "its process was killed by SIGKILL, most often because memory ran out"
    seen.clear()
    again = fewbit.compare(plans=["nf4", "int8"], progress=seen.append, **SMALL)
    assert [(row.plan, row.status, row.reused) for row in again.rows] == [
        ("nf4", "done", False),
        ("int8", "done", True),
    ]
    assert "quantizing" not in {event.state for event in seen}  # what was quantized before is used


def test_unknown_plans_are_all_named_before_any_work(fewbit: Fewbit, tmp_path: Path) -> None:
    answer = fewbit("compare", "--plans", "bf16,int9,gptq-5bit", "-o", tmp_path / "out")
    assert answer.code == 2
    assert "unknown plan 'int9'; unknown plan 'gptq-5bit'" in answer.err
    assert "Known: awq-4bit, bf16, " in answer.err
    assert not (tmp_path / "out").exists()
    assert "Did you mean" in fewbit("compare", "--plans", "gptq-4bits").err
    assert fewbit("compare", "--plans", ",").code == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("notes.txt", "mine", "is not empty, and holds no report.json"),
        ("report.json", '{"rows": []}', "is not a report of fewbit compare"),
        ("report.json", '{"kind": "fewbit comparison", "schema_version": 0}', "schema_version 0"),
    ],
)
def test_a_folder_that_is_no_report_of_ours_is_left_alone(
    fewbit: Fewbit, tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    answer = fewbit("compare", "-o", tmp_path)
    assert answer.code == 2
    assert words in answer.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == text


def test_a_report_that_finds_no_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    compared = Comparison.read(Path(__file__).parents[1] / "data" / "report.json")
    with pytest.raises(OutputError, match="could not be written: Not a directory") as raised:
        compare.write(compared, tmp_path / "file" / "out")
    assert "reuses all measurements" in raised.value.hint


@pytest.mark.parametrize("full", ["fewbit.api.compare_worker.write_file", "os.posix_fallocate"])
def test_predictions_that_find_no_room_are_named(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rooms for hidden states and for logits, which are mapped: a disk that is full then would end the process."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def model(input_ids: Any, **_: Any) -> Any:
        shape = (*input_ids.shape, 8)
        return SimpleNamespace(hidden_states=[torch.zeros(shape)] * 3, logits=torch.ones(shape))

    original: Any = model
    original.device = torch.device("cpu")
    source: Any = SimpleNamespace(config={"vocab_size": 8})
    task = {"reference": str(tmp_path / "made" / "logits"), "device": "cpu", "trust_remote_code": False}
    windows = torch.ones(2, 5, dtype=torch.int64)
    with monkeypatch.context() as here:
        here.setattr(full, fail, raising=False)  # macOS has no posix_fallocate
        with pytest.raises(OutputError, match=f"cannot write to the cache {tmp_path}.*: No space left on device"):
            compare_worker._reference(task, source, original, windows, lambda done: None)
    assert not [file for file in (tmp_path / "made").iterdir() if file.name.startswith(".")]
    recorded, states = compare_worker._reference(task, source, original, windows, lambda done: None)
    assert (states.shape, recorded.logits.tolist()) == ((2, 5, 8), torch.ones(2, 5, 8).tolist())


def test_what_no_plan_can_have_is_refused_at_once(fewbit: Fewbit, tmp_path: Path) -> None:
    assert "--length 4096 is beyond the model's context of 512 tokens" in fewbit("compare", "--length", 4096).err
    assert "--length 1: a window needs at least 2 tokens" in fewbit("compare", "--length", 1).err
    assert "the prompt is empty" in fewbit("compare", "--prompt", "").err
    assert "exceeds the model's context of 512" in fewbit("compare", "--prompt", "a b " * 1024).err
    assert fewbit("compare", "--samples", 0).code == 2
    assert fewbit("compare", tmp_path / "nowhere").code == 2
    assert fewbit("compare", "-o", __file__).code == 2


def test_a_model_that_is_there_is_measured_as_it_is(tmp_path: Path) -> None:
    model, made, text = models.save(tmp_path / "model", "llama"), tmp_path / "made", tmp_path / "text.txt"
    text.write_text(models.sentences(80), encoding="utf-8")
    asked: dict[str, Any] = {"text": str(text), "length": 32, "samples": 2}
    fewbit.quantize(model, made, plan="nf4")
    by_plan, by_folder = fewbit.compare(model, plans=["nf4", made], **asked).rows
    assert (by_folder.plan, by_folder.what, by_folder.quantizing) == ("made", "as it is: nf4-b64-dq", None)
    assert by_folder.loss == by_plan.loss
    original, other = fewbit.compare(made, plans=["bf16", model], **asked).rows
    assert (original.what, other.plan, other.what) == ("the original, bnb", "model", "as it is: not quantized")
    assert other.loss is not None
    assert other.loss.kl.value > 0
    (again,) = fewbit.compare(made, plans=["int8"], **asked).rows
    assert again.loss is not None
    assert again.loss.kl.value > 0
    models.edit_json(made / "config.json", note="changed")
    assert [row.reused for row in fewbit.compare(model, plans=["nf4", made], **asked).rows] == [True, False]
    other_words = models.save(tmp_path / "other", "llama")
    found = json.loads((other_words / "tokenizer.json").read_text(encoding="utf-8"))
    found["model"]["vocab"] = {**found["model"]["vocab"], "zzz": 290}
    (other_words / "tokenizer.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(PlanError, match="have different tokenizers"):
        fewbit.compare(model, plans=[other_words], **asked)


def test_models_that_are_there_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(compare._Bench, "rows", work)
    model, text = models.save(tmp_path / "model", "llama"), tmp_path / "text.txt"
    text.write_text(models.sentences(80), encoding="utf-8")
    more_rows = models.save(tmp_path / "more", "llama", vocab_size=512)
    short = models.save(tmp_path / "short", "llama", max_position_embeddings=32)
    for one, other in ((model, more_rows), (more_rows, model)):
        with pytest.raises(PlanError, match=r"the vocabulary of .* has (288|512) entries, and that of"):
            fewbit.compare(one, plans=[other], text=str(text))
        with pytest.raises(PlanError, match=r"the vocabulary of .* has (288|512) entries, and that of"):
            fewbit.evaluate(one, reference=other, text=str(text))
    with pytest.raises(PlanError, match="length=64 is beyond the model's context of 32 tokens"):
        fewbit.compare(model, plans=["bf16", short], text=str(text), length=64)
    with pytest.raises(PlanError, match=r"the prompt has .* the model's context of 32"):
        fewbit.compare(model, plans=["bf16", short], text=str(text), prompt="The cat sat. " * 8)
    few_rows = models.save(tmp_path / "few", "llama", vocab_size=40)
    with pytest.raises(FormatError, match="the model's embedding has 40 rows"):
        fewbit.compare(few_rows, plans=["bf16"], text=str(text))
