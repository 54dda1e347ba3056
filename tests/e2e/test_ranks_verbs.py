"""Several processes train one adapter, as one process with larger batches does. Other verbs run in one process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

import fewbit
from fewbit import PlanError
from fewbit.api.arguments import checked
from fewbit.cli import app
from fewbit.errors import PeerError
from fewbit.system import ranks
from tests import architectures, models
from tests.e2e.test_ranks import device_for, torchrun

EXAMPLES = 37  # neither a multiple of 2 processes nor of their batches
ONE_PROCESS = {"compare", "convert", "merge", "push", "tune"}

# What each process does: it trains on its own batches, and says what it was told.
TRAINS = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
import fewbit
model, data, out = sys.argv[1:]
tuning = fewbit.Tuning(batch=2, accumulate=2, length=32, learning_rate=0.01, epochs=2, held_out=0.2)
done = asdict(fewbit.finetune(model, out, data=data, tuning=tuning))
Path(out + "-" + os.environ["RANK"]).write_text(json.dumps(done))
"""

# Each process calls each verb that runs in one process; then the first one does what compares and measures.
ALONE = """
import os, sys
from pathlib import Path
import fewbit
model, packed, adapter, text, out = sys.argv[1:]
first = os.environ["RANK"] == "0"
if not first:
    calls = {
        "compare": lambda: fewbit.compare(model, plans=["rtn-4bit"], text=text),
        "convert": lambda: fewbit.convert(packed, to="q4_0", out=out + ".gguf"),
        "merge": lambda: fewbit.merge(packed, adapter, out),
        "push": lambda: fewbit.push(packed, "someone/something"),
        "tune": lambda: fewbit.tune(packed, out, reference=model, calibration=text),
    }
    said = []
    for name, call in calls.items():
        try:
            call()
        except fewbit.PlanError as error:
            said.append(f"{name}: {error}")
    Path(out + "-refused").write_text("\\n".join(said))
else:
    compared = fewbit.compare(model, plans=["rtn-4bit"], text=text, samples=2, length=32)
    fewbit.merge(packed, adapter, out, text=text, samples=2, length=32, plan="rtn-4bit")
    Path(out + "-compared").write_text(compared.rows[0].reason or "done")
"""


# In the third step, the loss of one process alone is not finite.
STOPS = """
import os, sys
from transformers import Trainer
import fewbit
step = Trainer.training_step
def spoilt(self, *args, **more):
    loss = step(self, *args, **more)
    return loss * float("nan") if self.state.global_step == 2 and os.environ["RANK"] == "1" else loss
Trainer.training_step = spoilt
model, data, out = sys.argv[1:]
try:
    fewbit.finetune(model, out, data=data, tuning=fewbit.Tuning(length=32, steps=4, batch=1, accumulate=2))
except fewbit.FewbitError as error:  # of the kind PeerError in the process that fails second
    open(f"{out}-{os.environ['RANK']}", "w").write(str(error))
"""


# The command line, where the process of this rank starts two seconds after the other.
LATE = """
import os, sys, time
if os.environ["RANK"] == sys.argv.pop(1):
    time.sleep(2)
from fewbit.cli import app
app.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("ranks") / "model", "llama", dtype="float32")


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    out = model.parent / "packed"
    fewbit.quantize(model, out, plan="rtn-4bit")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of unequal lengths, so that batches have unequal numbers of learned tokens."""
    place = tmp_path_factory.mktemp("ranks") / "data.jsonl"
    lines = [json.dumps({"text": models.sentences(1 + i % 4)}) for i in range(EXAMPLES)]
    place.write_text("\n".join(lines), encoding="utf-8")
    return place


def work(folder: Path, code: str) -> str:
    script = folder / "work.py"
    script.write_text(code, encoding="utf-8")
    return str(script)


def test_two_processes_train_as_one_with_twice_the_batch(packed: Path, data: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    ended = torchrun(2, work(tmp_path, TRAINS), str(packed), str(data), str(both), cache=tmp_path / "cache")
    assert ended.returncode == 0, ended.stderr
    tuning = fewbit.Tuning(batch=4, accumulate=2, length=32, learning_rate=0.01, epochs=2, held_out=0.2)
    done = fewbit.finetune(packed, tmp_path / "one", data=str(data), tuning=tuning, device=device_for(2))
    for rank in range(2):
        told = json.loads((tmp_path / f"both-{rank}").read_text(encoding="utf-8"))
        assert (told["steps"], told["examples"], told["nbytes"]) == (done.steps, done.examples, done.nbytes)
        assert told["held_out_before"] == pytest.approx(done.held_out_before, rel=1e-6)
        assert told["held_out_after"] == pytest.approx(done.held_out_after, rel=1e-4)
        assert told["loss"] == pytest.approx(done.loss, rel=1e-4)
    mine, its = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("both", "one"))
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert torch.linalg.norm(mine[name] - tensor) <= 1e-3 * torch.linalg.norm(tensor), name


def test_experts_that_a_process_does_not_reach_train_too(data: Path, tmp_path: Path) -> None:
    experts = tmp_path / "packed"
    fewbit.quantize(architectures.save(tmp_path / "experts", "qwen3_moe"), experts, plan="rtn-4bit")
    asked = ["-m", "fewbit", "finetune", str(experts), "--data", str(data), "-o", str(tmp_path / "out")]
    few = ["--batch", "1", "--length", "4", "--steps", "3", "--json"]
    ended = torchrun(2, *asked, *few, cache=tmp_path / "cache")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] == 3  # one process prints
    assert ended.stderr.count("step 3/3") == 1
    assert "unused parameters" not in ended.stderr
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(".experts." in name and "lora_B" in name and tensor.any() for name, tensor in trained.items())


def test_all_stop_where_the_loss_of_one_is_not_finite(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = torchrun(2, work(tmp_path, STOPS), str(model), str(data), str(out), cache=tmp_path / "cache")
    assert ended.returncode == 0, ended.stderr
    said = [Path(f"{out}-{rank}").read_text(encoding="utf-8") for rank in range(2)]
    for each in said:
        assert f"in step 3 of 4: {out} holds the adapter as of step 1" in each
    assert (out / "adapter_model.safetensors").exists()


def test_a_rate_that_is_too_high_is_one_error(model: Path, data: Path, tmp_path: Path) -> None:
    asked = ["-m", "fewbit", "finetune", str(model), "--data", str(data), "-o", str(tmp_path / "out")]
    ended = torchrun(2, *asked, "--learning-rate", "1e30", "--length", "32", cache=tmp_path / "cache")
    assert ended.returncode
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "not finite" in ended.stderr or "the loss is" in ended.stderr


@pytest.mark.parametrize("command", ["finetune", "quantize"])
def test_what_one_process_finds_is_said_once(command: str, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    (out / "notes.txt").touch()
    more = ["--data", str(data)] if command == "finetune" else []
    refused = torchrun(2, "-m", "fewbit", command, str(model), "-o", str(out), *more, cache=tmp_path / "cache")
    assert refused.stderr.count("error: ") == 1, refused.stderr
    assert "taken exists" in refused.stderr
    assert 'Traceback (most recent call last):\n  File "<frozen runpy>' not in refused.stderr.split("ChildFailed")[1]


@pytest.mark.parametrize("late", ["0", "1"])
def test_an_error_is_one_json_object(late: str, tmp_path: Path) -> None:
    """Whichever process fails first. Rank 0 prints the object, and torchrun ends it soon after another process ends."""
    asked = ["quantize", "./nowhere", "-o", str(tmp_path / "out"), "--json"]
    refused = torchrun(2, work(tmp_path, LATE), late, *asked, cache=tmp_path / "cache")
    assert "model ./nowhere: no such folder" in json.loads(refused.stdout)["error"]["message"]
    assert refused.stderr.count("error: ") == 1, refused.stderr


@pytest.mark.parametrize("late", ["0", "1"])
def test_stdin_is_refused_because_processes_cannot_share_it(late: str, model: Path, tmp_path: Path) -> None:
    asked = ["quantize", str(model), "-o", str(tmp_path / "out"), "--calibration", "-"]
    refused = torchrun(2, work(tmp_path, LATE), late, *asked, cache=tmp_path / "cache")
    assert refused.stderr.count("error: - stands for stdin, which several processes cannot share") == 1
    assert not (tmp_path / "out").exists()


def test_other_verbs_run_in_the_first_process_only(model: Path, packed: Path, data: Path, tmp_path: Path) -> None:
    adapter, text, out = tmp_path / "adapter", tmp_path / "text.txt", tmp_path / "out"
    fewbit.finetune(packed, adapter, data=str(data), tuning=fewbit.Tuning(steps=1, length=32))
    text.write_text(models.sentences(200), encoding="utf-8")
    asked = [str(each) for each in (model, packed, adapter, text, out)]
    ended = torchrun(2, work(tmp_path, ALONE), *asked, cache=tmp_path / "cache")
    assert ended.returncode == 0, ended.stderr
    refused = Path(f"{out}-refused").read_text(encoding="utf-8")
    for verb in ONE_PROCESS:
        assert f"{verb}: {verb} runs in one process, and this is process 1 of 2\n" in refused
    assert Path(f"{out}-compared").read_text(encoding="utf-8") == "done"
    assert (out / "config.json").exists()


def test_every_verb_shares_or_runs_in_one_process() -> None:
    verbs = {name for name in fewbit.__all__ if hasattr(getattr(fewbit, name), "__wrapped__")}
    assert verbs == {*ranks.SHARED, *ranks.EACH, *ONE_PROCESS}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("command", sorted(typer.main.get_command(app.app).commands))  # type: ignore[attr-defined]
def test_every_other_command_is_an_error(command: str, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    if command in (*ranks.SHARED, "generate", "run"):
        app._among_others([command, "tiny"])
        return
    with pytest.raises(PlanError if rank == "0" else PeerError, match=f"{command} runs in one process"):
        app._among_others([command, "tiny"])


def test_a_verb_that_nobody_sorted_runs_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    @checked
    def new(model: str) -> int:
        return ranks.launched()

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert new("tiny") == 1
    assert ranks.launched() == 2
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(PlanError, match="new runs in one process, and this is process 1 of 2"):
        new("tiny")
