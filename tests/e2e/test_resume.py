"""A run that is killed leaves nothing beside the output, and the same command resumes where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fewbit
from fewbit.pipeline import progress as pipeline
from fewbit.plans.plan import find
from fewbit.system import kept
from fewbit.texts.calibration import Calibration
from tests import models
from tests.limits import HANG

BLOCKS = 4
STOPS = [
    (signal.SIGKILL, "blocks"),
    (signal.SIGINT, "blocks"),
    (signal.SIGTERM, "blocks"),
    (signal.SIGKILL, "files"),
    (signal.SIGTERM, "files"),
    (signal.SIGHUP, "files"),
]
# The command line, halted for good after the second block or in the midst of putting the output together.
# A test run in a shell's background inherits SIGINT ignored, and one under nohup SIGHUP; a user's terminal does not.
HALTED = """
import signal, sys
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGUSR1, lambda *_: None)  # ends the pause
from fewbit.cli import app
from fewbit.pipeline import run, write_folder
torch.set_num_threads(1)
save, write = run.Run.save, write_folder.write
def save_then_wait(self, index, tensors, reports):
    save(self, index, tensors, reports)
    if index == 1:
        signal.pause()
def write_then_wait(*arguments):
    write(*arguments)
    signal.pause()
if sys.argv.pop(1) == "blocks":
    run.Run.save = save_then_wait
else:
    write_folder.write = write_then_wait
app.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("resume") / "model", "llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def wanted(text: Path) -> Calibration:
    return Calibration(str(text), samples=6, length=32, seed=1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The output, in a folder of its own, so that whatever lies beside it is seen."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out"


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; of the record, what does not tell of time."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    record = json.loads(found["fewbit.json"])
    del record["seconds"]
    return {**found, "fewbit.json": json.dumps(record).encode()}


def quantized(model: Path, out: Path, wanted: Calibration) -> list[bool]:
    """Whether each block's result was found."""
    steps: list[pipeline.Step] = []
    fewbit.quantize(model, out, calibration=wanted, progress=steps.append)
    assert [step.done for step in steps] == list(range(1, BLOCKS + 1))
    assert {step.total for step in steps} == {BLOCKS}
    return [step.resumed for step in steps]


@pytest.fixture(params=STOPS, ids=str)
def stopped(
    request: pytest.FixtureRequest, model: Path, wanted: Calibration, place: Path, own_cache: Path
) -> tuple[signal.Signals, str, int, str]:
    """A run in a process of its own, stopped by a signal: which, where it stood, its exit code and what it said."""
    how, where = request.param
    command = [sys.executable, "-W", "ignore", "-c", HALTED, where, "quantize", str(model), "-o", str(place)]
    command += ["--calibration", wanted.text, "--samples", "6", "--length", "32", "--seed", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=dict(os.environ))
    try:
        deadline = time.monotonic() + HANG
        while not list(own_cache.glob("runs/*/block-00001.safetensors")) or (
            where == "files" and not list(place.parent.glob(".out.fewbit-*/new/config.json"))
        ):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)
        _, said = process.communicate(timeout=HANG)
    finally:
        process.kill()
        process.wait()
    return how, where, process.returncode, said


def test_it_goes_on_where_it_stopped(
    stopped: tuple[signal.Signals, str, int, str],
    model: Path,
    wanted: Calibration,
    place: Path,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how, where, code, said = stopped
    (unfinished,) = (entry for entry in kept.entries() if entry.kind == "runs")
    assert (unfinished.model, unfinished.holds) == (str(model), "blocks quantized by gptq-4bit")
    left = list(place.parent.iterdir())
    if where == "blocks" or how != signal.SIGKILL:
        assert left == []
    else:  # nobody cleans up after SIGKILL; but what is left is not the output, and the next run clears it away
        assert [path.name.startswith(".out.fewbit-") for path in left] == [True]
    if how != signal.SIGKILL:
        assert code == 128 + how
        assert "Traceback" not in said
        assert "the same command resumes" in said
    assert quantized(model, place, wanted) == ([True, True, False, False] if where == "blocks" else [True] * BLOCKS)
    assert list(place.parent.iterdir()) == [place]
    assert not list(own_cache.glob("runs/*"))
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "another"))
    assert quantized(model, tmp_path / "straight", wanted) == [False] * BLOCKS
    assert contents(place) == contents(tmp_path / "straight")


def test_two_runs_at_once_do_not_disturb_each_other(
    model: Path, wanted: Calibration, tmp_path: Path, own_cache: Path
) -> None:
    def other(step: pipeline.Step) -> None:
        if step.done == 3:
            with pytest.warns(UserWarning, match="another process does the same work"):
                assert quantized(model, tmp_path / "A", wanted) == [False] * BLOCKS

    fewbit.quantize(model, tmp_path / "B", calibration=wanted, progress=other)
    assert contents(tmp_path / "A") == contents(tmp_path / "B")
    assert not list(own_cache.glob("runs/*"))


def command(model: Path, out: Path, wanted: Calibration, *before: str) -> list[str]:
    return [
        *(sys.executable, *before, "quantize", str(model), "-o", str(out), "--calibration", str(wanted.text)),
        *("--samples", "6", "--length", "32", "--seed", "1"),
    ]


def test_two_processes_do_not_write_the_same_files(
    model: Path, wanted: Calibration, tmp_path: Path, own_cache: Path
) -> None:
    """The second says so at once: with another output it works in a folder of its own, with the same one it ends."""
    first = subprocess.Popen(
        command(model, tmp_path / "A", wanted, "-W", "ignore", "-c", HALTED, "blocks"), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + HANG
        while not list(own_cache.glob("runs/*/block-00001.safetensors")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (place,) = own_cache.glob("runs/*")
        times = {file: file.stat().st_mtime_ns for file in place.glob("block-*")}
        same, other = (
            subprocess.run(
                command(model, tmp_path / out, wanted, "-m", "fewbit"),
                capture_output=True,
                text=True,
                encoding="utf-8",
            )
            for out in ("A", "B")
        )
        assert same.returncode == 2
        assert f"error: another process is making {tmp_path / 'A'}" in same.stderr
        assert "block" not in same.stderr
        assert other.returncode == 0, other.stderr
        said = other.stderr.splitlines()
        (note,) = [number for number, line in enumerate(said) if "another process does the same work" in line]
        assert note < next(number for number, line in enumerate(said) if line.startswith("block 1/"))
        assert times == {file: file.stat().st_mtime_ns for file in place.glob("block-*")}
        first.send_signal(signal.SIGUSR1)
        assert first.wait(HANG) == 0
    finally:
        first.kill()
        first.wait()
    assert contents(tmp_path / "A") == contents(tmp_path / "B")
    assert not list(own_cache.glob("runs/*"))
    assert not list(own_cache.glob("outputs/*"))


class _Stop(Exception):
    pass


def stop_after(blocks: int) -> pipeline.Progress:
    def progress(step: pipeline.Step) -> None:
        if step.done == blocks:
            raise _Stop

    return progress


@pytest.mark.parametrize("change", ["seed", "damp", "weights"])
def test_another_run_takes_nothing_over(
    change: str, model: Path, wanted: Calibration, text: Path, tmp_path: Path, own_cache: Path
) -> None:
    if change == "weights":
        model = models.save(tmp_path / "model", "llama", num_hidden_layers=BLOCKS)
    with pytest.raises(_Stop):
        fewbit.quantize(model, tmp_path / "out", calibration=wanted, progress=stop_after(3))
    assert not (tmp_path / "out").exists()
    assert len(list(own_cache.glob("runs/*/block-*"))) == 3
    steps: list[pipeline.Step] = []
    plan = find("gptq-4bit")
    if change == "seed":
        wanted = Calibration(str(text), samples=6, length=32, seed=2)
    elif change == "damp":
        plan = plan.changed(options={"damp": "0.02"})
    else:
        models.save(model, "llama", num_hidden_layers=BLOCKS)
    fewbit.quantize(model, tmp_path / "out", plan=plan, calibration=wanted, progress=steps.append)
    assert [step.resumed for step in steps] == [False] * BLOCKS


def test_a_damaged_result_is_made_again(model: Path, wanted: Calibration, place: Path, own_cache: Path) -> None:
    with pytest.raises(_Stop):
        fewbit.quantize(model, place, calibration=wanted, progress=stop_after(3))
    (found,) = own_cache.glob("runs/*/block-00001.safetensors")
    found.write_bytes(found.read_bytes()[:-100])
    assert quantized(model, place, wanted)[0] is True
