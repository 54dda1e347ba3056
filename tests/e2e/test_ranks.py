"""Several processes quantize as one does, to the same output up to the order of sums; when one dies, all end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit.pipeline import capture, progress
from fewbit.schemes import bits
from fewbit.texts.calibration import Calibration
from tests import models
from tests.limits import HANG
from tests.models import VOCAB

BLOCKS = 3
SAMPLES = 7  # so that neither 2 nor 3 processes have equal parts
PLANS = {"gptq": "gptq-4bit", "awq": "awq-4bit", "rtn": "rtn-4bit", "gguf": "q4_k_m"}

# What every process of a run does: all verbs that are parted, one after the other.
WORK = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
import fewbit
from fewbit.texts.calibration import Calibration
model, wide, text, out = map(Path, sys.argv[1:])
wanted = Calibration(str(text), samples=7, length=32, seed=1)
for name, plan in {plans}.items():
    place = out / (name + ".gguf" if name == "gguf" else name)
    fewbit.quantize(wide if name == "gguf" else model, place, plan=plan, calibration=wanted)
fewbit.imatrix(wide, out / "imatrix.gguf", calibration=wanted)
found = fewbit.evaluate(out / "gptq", reference=model, text=str(text), length=32, samples=5)
(out / ("quality-" + os.environ["RANK"])).write_text(json.dumps(asdict(found.quality)))
""".replace("{plans}", repr(PLANS))

# What the linears of a second block read, compared with the original model, after a first block that lost something.
SHIFT = """
import sys
from pathlib import Path
import torch
from fewbit.models.source import locate
from fewbit.pipeline import capture, staged
from fewbit.pipeline.job import Job
from fewbit.plans.plan import find
from fewbit.stats import Need
from fewbit.system import ranks
def run(model, out):
    skeleton = Job.prepare(locate(model), find("gptq-4bit"), "cpu").settled.skeleton
    capture._COMPARED = 128  # so that every second window is compared
    inputs = capture.Inputs(torch.arange(9 * 32).view(9, 32) % 200)
    hidden, calls = capture.captured(skeleton, inputs, compares=True)
    original = capture.original_of(inputs, hidden)
    for index, name in enumerate(skeleton.blocks[:2]):
        with skeleton.materialized(name) as module:
            block = capture.Block(skeleton, name, module, calls[name], hidden, original)
            if not index:
                original.advance(skeleton, block.run)
                for linear in skeleton.linears(name):
                    skeleton.weight(linear).mul_(0.9)
                block.replay()
                continue
            stats = capture.gather(block, dict.fromkeys(skeleton.linears(name), Need.HESSIAN))
            staged.add_shifts(block, stats)
    if ranks.first():
        torch.save({name: (each.shift.fit, each.shift.held_out) for name, each in stats.items()}, out)
if __name__ == "__main__":
    with ranks.joined("cpu"):
        run(*map(Path, sys.argv[1:]))
"""

# The command line in a process that ends itself when the second block is done.
MORTAL = """
import os, signal, sys, time
from fewbit.cli import app
from fewbit.pipeline import blocks
from fewbit.system import ranks
run = blocks._quantize_block
def die(settled, block, *others):
    if block.name.endswith(".2") and ranks.rank() == {victim}:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(settled, block, *others)
blocks._quantize_block = die
record = ranks._failed_before
def late(store):
    time.sleep(0.5 * int(os.environ["RANK"]))  # rank 0, which keeps the record, is the first
    return record(store)
ranks._failed_before = late
app.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("ranks") / "model", "llama", num_hidden_layers=BLOCKS, dtype="float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough for blocks of 256."""
    place = tmp_path_factory.mktemp("ranks") / "wide"
    return models.save(place, "llama", num_hidden_layers=1, hidden_size=256, intermediate_size=512, dtype="float32")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks") / "text.txt"
    place.write_text(models.sentences(400), encoding="utf-8")
    return place


def device_for(count: int) -> str:
    """The device of so many processes on this machine: GPUs if there is one for each."""
    return "cuda" if torch.cuda.device_count() >= count else "cpu"


def torchrun(count: int, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *arguments,
    ]
    environment = {**os.environ, "FEWBIT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    if device_for(count) == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG, encoding="utf-8")


@pytest.fixture(scope="module", params=[2, 3])
def made(
    request: pytest.FixtureRequest, model: Path, wide: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """What that many processes made, and what each of them was told of its quality."""
    out = tmp_path_factory.mktemp(f"of-{request.param}")
    script = out / "work.py"
    script.write_text(WORK, encoding="utf-8")
    arguments = [str(path) for path in (script, model, wide, corpus, out)]
    ended = torchrun(request.param, *arguments, cache=tmp_path_factory.mktemp("cache"))
    assert ended.returncode == 0, ended.stderr
    return out, [json.loads((out / f"quality-{rank}").read_text(encoding="utf-8")) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone_on(model: Path, wide: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What one process makes on a device."""
    wanted = Calibration(str(corpus), samples=SAMPLES, length=32, seed=1)

    @cache
    def make(device: str) -> Path:
        out = tmp_path_factory.mktemp("alone")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEWBIT_CACHE", str(tmp_path_factory.mktemp("cache")))
            for name, plan in PLANS.items():
                place = out / (f"{name}.gguf" if name == "gguf" else name)
                source = wide if name == "gguf" else model
                fewbit.quantize(source, place, plan=plan, calibration=wanted, device=device)
            fewbit.imatrix(wide, out / "imatrix.gguf", calibration=wanted, device=device)
        return out

    return make


@pytest.fixture
def alone(made: tuple[Path, list[dict[str, Any]]], alone_on: Callable[[str], Path]) -> Path:
    """What one process makes on the device of those of `made`."""
    return alone_on(device_for(len(made[1])))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differing(one: Path, other: Path) -> float:
    """Share of the codes that are not the same."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    pairs = [(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a if name.endswith(".qweight")]
    codes = [(bits.unpack(x.flatten(), 4, 2 * x.numel()), bits.unpack(y.flatten(), 4, 2 * y.numel())) for x, y in pairs]
    return float(torch.cat([(x != y).float() for x, y in codes]).mean())


def errors(folder: Path) -> list[float]:
    return [tensor["error"] for tensor in json.loads((folder / "fewbit.json").read_text(encoding="utf-8"))["tensors"]]


def test_what_no_input_decides_is_the_same_to_the_byte(made: tuple[Path, list[dict[str, Any]]], alone: Path) -> None:
    out, _ = made
    one, several = tensors(alone / "rtn"), tensors(out / "rtn")
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_codes_differ_no_more_than_by_another_order_of_sums(
    name: str, made: tuple[Path, list[dict[str, Any]]], alone: Path
) -> None:
    out, _ = made
    assert differing(alone / name, out / name) < {"gptq": 0.02, "awq": 0.002}[name]
    one, several = errors(alone / name), errors(out / name)
    assert sum(several) == pytest.approx(sum(one), rel=2e-3)
    assert several == pytest.approx(one, rel=0.03)


def test_another_order_of_sums_makes_no_more_than_that(
    alone_on: Callable[[str], Path], model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process that takes its windows in other batches. Whether a code differs at all depends on the processor."""
    one = alone_on("cpu") / "gptq"
    monkeypatch.setattr(capture, "_TOKENS_AT_ONCE", 2 * 32)
    wanted = Calibration(str(corpus), samples=SAMPLES, length=32, seed=1)
    fewbit.quantize(model, tmp_path / "out", calibration=wanted, device="cpu")
    assert differing(one, tmp_path / "out") < 0.02


@pytest.mark.parametrize("count", [2, 3])
def test_the_shift_is_the_same_to_five_digits(
    count: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the compared windows 0, 2, 4, 6, 8 is held out, whichever process has it."""
    monkeypatch.setattr(capture, "_COMPARED", capture._COMPARED)  # this process runs the script too, which sets it
    script = tmp_path / "shift.py"
    script.write_text(SHIFT, encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "shift"}
    exec(compile(SHIFT, "shift.py", "exec"), namespace)
    namespace["run"](model, tmp_path / "alone")
    ended = torchrun(count, str(script), str(model), str(tmp_path / "several"), cache=tmp_path / "cache")
    assert ended.returncode == 0, ended.stderr
    one, several = torch.load(tmp_path / "alone"), torch.load(tmp_path / "several")
    assert one.keys() == several.keys()
    for name, parts in one.items():
        for own, other in zip(parts, several[name], strict=True):
            assert own.any()
            assert (own - other).norm() < 1e-5 * own.norm(), name


def test_importances_are_the_same_to_six_digits(made: tuple[Path, list[dict[str, Any]]], alone: Path) -> None:
    from fewbit.formats.containers import imatrix

    one, several = imatrix.read(alone / "imatrix.gguf"), imatrix.read(made[0] / "imatrix.gguf")
    assert one.keys() == several.keys()
    for name, importance in one.items():
        torch.testing.assert_close(several[name].mean_square, importance.mean_square, rtol=1e-5, atol=1e-9)
        assert several[name].rows == importance.rows


def test_a_gguf_file_of_several_says_the_same(made: tuple[Path, list[dict[str, Any]]], alone: Path) -> None:
    own = fewbit.load(made[0] / "gguf.gguf")
    other = fewbit.load(alone / "gguf.gguf")
    ids = torch.arange(20)[None] % VOCAB
    with torch.inference_mode():
        a, b = own(input_ids=ids).logits, other(input_ids=ids).logits
    assert (a - b).norm() < 0.05 * b.norm()


def test_every_process_is_told_the_quality_of_all_windows(
    made: tuple[Path, list[dict[str, Any]]], model: Path, corpus: Path
) -> None:
    out, found = made
    device = device_for(len(found))
    exact = fewbit.evaluate(
        out / "gptq", reference=model, text=str(corpus), length=32, samples=5, device=device
    ).quality
    for quality in found:
        assert quality == found[0]
        assert (quality["tokens"], quality["windows"]) == (exact.tokens, 5)
        assert quality["perplexity"]["value"] == pytest.approx(exact.perplexity.value, rel=1e-5)
        assert exact.kl is not None
        assert quality["kl"]["mean"]["value"] == pytest.approx(exact.kl.mean.value, rel=1e-4)


def test_the_command_speaks_once(model: Path, corpus: Path, tmp_path: Path, own_cache: Path) -> None:
    asked = ["-m", "fewbit", "quantize", str(model), "-o", str(tmp_path / "out"), "--calibration", str(corpus)]
    said = torchrun(2, *asked, "--samples", "4", "--length", "32", "--json", cache=own_cache)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["out"] == str(tmp_path / "out")
    assert said.stderr.count("block 3/3") == 1
    assert not list(own_cache.glob("runs/*"))
    for more, message in (
        (["--samples", "4"], "out exists"),
        (["--samples", "1", "--overwrite"], r"fewer windows (1) than there are processes (2)"),
    ):
        refused = torchrun(2, *asked, *more, cache=own_cache)
        assert refused.returncode
        assert refused.stderr.count("error: ") == 1, refused.stderr
        assert message in refused.stderr
    refused = torchrun(2, "-m", "fewbit", "compare", str(model), cache=own_cache)
    assert refused.stderr.count("error: compare runs in one process") == 1


def started(commands: list[list[str]]) -> list[subprocess.Popen[str]]:
    """Processes as torchrun starts them, but with nobody who ends the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = len(commands)
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            encoding="utf-8",
        )
        for rank, command in enumerate(commands)
    ]


def quantizing(model: Path, corpus: Path, out: Path) -> list[str]:
    arguments = ["quantize", str(model), "-o", str(out), "--calibration", str(corpus), "--device", "cpu"]
    return [*arguments, "--samples", str(SAMPLES), "--length", "32", "--seed", "1"]


@pytest.mark.parametrize("wrong", [["--samples", "0"], ["--no-such-flag"], ["--plan", "gptq-5"]])
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_wrong_arguments_of_one_end_all_with_one_error(
    victims: list[int], wrong: list[str], model: Path, corpus: Path, tmp_path: Path, own_cache: Path
) -> None:
    command = ["-m", "fewbit", *quantizing(model, corpus, tmp_path / "out")]
    processes = started([command + wrong if rank in victims else command for rank in range(2)])
    try:
        # Left to themselves the others would wait for days.
        said = [process.communicate(timeout=HANG)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode for process in processes)
    assert sum(text.count("error: ") for text in said) == 1, said
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()


def test_one_that_dies_ends_all_and_the_next_run_goes_on(
    model: Path, corpus: Path, tmp_path: Path, own_cache: Path
) -> None:
    out = tmp_path / "outputs" / "out"
    out.parent.mkdir()
    script = MORTAL.format(victim=1)
    processes = started([["-c", script, *quantizing(model, corpus, out)]] * 3)
    try:
        assert processes[1].wait(HANG) == -signal.SIGKILL
        # Left to themselves the others would wait for days.
        said = [process.communicate(timeout=HANG)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == processes[2].returncode == 6
    assert sum(text.count("error: ") for text in said) == 1
    assert sum("another process of this run has ended" in text for text in said) == 1
    assert "Traceback" not in "".join(said)
    assert not list(out.parent.iterdir())
    steps: list[progress.Step] = []
    wanted = Calibration(str(corpus), samples=SAMPLES, length=32, seed=1)
    fewbit.quantize(model, out, calibration=wanted, device="cpu", progress=steps.append)
    assert [step.resumed for step in steps] == [True, True, False]
