"""Scores on tasks by lm-evaluation-harness, over local data: by `evaluate --tasks`, and by its own command."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.errors import FormatError, PlanError
from tests.docs_pages import ROOT, blocks
from tests.e2e.conftest import fewbit as fewbit_fixture
from tests.served import served

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # those of the harness
]
command = fewbit_fixture

DATA = (
    ("Once upon a time, there was a little", ["girl", "carburettor"], 0),
    ("The sun is very", ["parliament", "hot"], 1),
    ("The dog likes to", ["quantum", "play"], 1),
    ("She was happy and", ["smiled", "sodium"], 1),  # a wrong answer, so that the score is not 1
    ("They lived in a small", ["tax", "village"], 1),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the harness in a file, over data in a file."""
    place = tmp_path_factory.mktemp("task")
    lines = [json.dumps({"text": text, "choices": choices, "answer": answer}) for text, choices, answer in DATA]
    (place / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (place / "words.yaml").write_text(
        "task: words\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {place}/data.jsonl\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        'doc_to_text: "{{text}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "metric_list:\n- metric: acc\n  aggregation: mean\n  higher_is_better: true\n",
        encoding="utf-8",
    )
    return place / "words.yaml"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("packed")
    made = {"nf4": place / "nf4", "rtn-4bit": place / "gptq", "q4_0": place / "tiny.gguf"}
    for plan, out in made.items():
        fewbit.quantize("tiny", out, plan=plan, calibration=fewbit.Calibration(samples=2, length=32))
    return made


def by_definition(name: str | Path) -> float:
    """The share of examples in which the right choice has the highest log-likelihood after the text."""
    pairs = zip(likelihoods(name), DATA, strict=True)
    return sum(found.index(max(found)) == answer for found, (_, _, answer) in pairs) / len(DATA)


def likelihoods(name: str | Path) -> list[list[float]]:
    """The log-likelihood of each choice after the text, of each example."""
    model: Any = fewbit.load(name, dtype="float32")
    from fewbit.models.skeleton import load_tokenizer
    from fewbit.models.source import locate

    tokenizer, every = load_tokenizer(locate(name)), []
    for text, choices, _ in DATA:
        found = []
        for choice in choices:
            begun = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = tokenizer(f"{text} {choice}", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids], dtype=torch.int64, device="cpu")).logits[0].double()
            logs = logits.log_softmax(-1)
            found.append(sum(logs[at - 1, ids[at]].item() for at in range(len(begun), len(ids))))
        every.append(found)
    return every


@pytest.mark.parametrize("plan", ["nf4", "rtn-4bit", "q4_0"])
def test_a_packed_model_is_scored_beside_its_original(plan: str, packed: dict[str, Path], task: Path) -> None:
    done = fewbit.evaluate(packed[plan], reference="tiny", samples=1, length=16, tasks=[task])
    (score,) = done.tasks
    assert (score.task, score.name, score.examples, score.shots, score.higher) == ("words", "acc", 5, 0, True)
    assert score.value == pytest.approx(by_definition(packed[plan]))
    assert score.reference == pytest.approx(by_definition("tiny"))
    assert 0 < score.value < 1
    # The standard error of a mean of five numbers that are 0 or 1.
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 4) ** 0.5)


def test_the_command_writes_scores_into_json_and_card(command: Any, packed: dict[str, Path], task: Path) -> None:
    flags = ("--reference", "tiny", "--samples", 1, "--length", 16, "--tasks", task, "--limit", 3)
    answer = command("evaluate", packed["nf4"], *flags, "--record", "--json")
    assert answer.code == 0, answer.err
    assert "it/s" not in answer.err
    (score,) = answer.json["tasks"]
    assert score["examples"] == 3
    card = (packed["nf4"] / "README.md").read_text(encoding="utf-8")
    assert f"| words, acc, 3 examples, 0 shots | {score['value']:.4g} ± {score['stderr']:.2g} | " in card
    printed = command("evaluate", packed["nf4"], *flags)
    assert "words, acc" in printed.out
    assert "3 examples, 0 shots; higher is better" in printed.out


def test_an_unknown_task_is_an_error_before_any_work(packed: dict[str, Path], task: Path) -> None:
    for wanted, says in (("helaswag", "Near it: hellaswag"), (str(task.with_name("none.yaml")), "no such file")):
        with pytest.raises(PlanError, match=says):
            fewbit.evaluate(packed["nf4"], tasks=wanted)
    broken = task.with_name("broken.yaml")
    broken.write_text("task: broken\ndataset_path: json\ndataset_kwargs:\n  data_files: none.json\n", encoding="utf-8")
    with pytest.raises((FormatError, PlanError), match=r"broken\.yaml"):
        fewbit.evaluate(packed["nf4"], tasks=broken)


def test_a_task_whose_data_are_not_here_is_an_error(
    packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewbit", "evaluate", str(packed["nf4"]), "--tasks", "hellaswag"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**environment(), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 2, done.stderr
    assert "task hellaswag: its data cannot be loaded" in done.stderr
    assert "give a task file over local data" in done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("plan", ["rtn-4bit", "nf4"])
def test_its_own_command_scores_packed_models(plan: str, packed: dict[str, Path], task: Path, tmp_path: Path) -> None:
    """`fewbit run -- lm_eval`, and the same score as from `evaluate`."""
    arguments: tuple[str, ...] = (
        "--model",
        "hf",
        "--model_args",
        f"pretrained={packed[plan]},dtype=float32",
        "--tasks",
        str(task),
    )
    arguments += ("--device", "cpu", "--output_path", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "fewbit", "run", "--", "lm_eval", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]["words"]
    (score,) = fewbit.evaluate(packed[plan], samples=1, length=16, tasks=task).tasks
    assert (found["acc,none"], found["acc_stderr,none"]) == (score.value, score.stderr)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_server_has_the_scores_of_its_model(batch: int, packed: dict[str, Path], task: Path, tmp_path: Path) -> None:
    """`lm_eval --model local-completions`, as people check a server: every likelihood is that of the loaded model."""
    with served(packed["nf4"]) as server:
        model = f"model=nf4,base_url={server.address}/v1/completions,tokenizer={packed['nf4']}"
        arguments = ("--model", "local-completions", "--model_args", model, "--batch_size", str(batch))
        flags = ("--tasks", str(task), "--output_path", str(tmp_path), "--log_samples")
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", *arguments, *flags],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment(),
        )
        assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [[float(each[0][0]) for each in line["resps"]] for line in sorted(lines, key=_document)]
    for ours, wanted in zip(found, likelihoods(packed["nf4"]), strict=True):
        assert ours == pytest.approx(wanted, abs=1e-3)


@pytest.mark.skipif(os.name == "nt", reason="the page has commands for a Unix shell")
def test_the_session_of_the_page_runs(packed: dict[str, Path], task: Path, tmp_path: Path) -> None:
    """docs/howto/serve.md, with a task over local data in place of its own."""
    if shutil.which("curl") is None:
        pytest.skip("the page calls curl")
    (block,) = [each for each in blocks(ROOT / "docs/howto/serve.md") if "lm_eval " in each.text]
    assert block.language == "sh"
    lines = [line for line in block.text.splitlines() if not line.startswith("pip install")]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lm_eval").write_text(f'#!/bin/sh\nexec {sys.executable} -m lm_eval "$@"\n', encoding="utf-8")
    (programs / "lm_eval").chmod(0o755)
    shutil.copytree(packed["nf4"], tmp_path / "out")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # A server that is left behind by a failure would keep the pipe open.
    commands = "\n".join(["trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *lines])
    done = subprocess.run(
        ["bash", "-e", "-c", commands.replace("8000", port).replace("arc_easy", str(task))],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={
            **environment(),
            "PATH": os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"])),
        },
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("|words")]
    # The server computes in the model's dtype: a choice may be another.
    assert float(line.split("|")[7]) == pytest.approx(by_definition(packed["nf4"]), abs=0.21)


def _document(line: dict[str, Any]) -> int:
    return int(line["doc_id"])
