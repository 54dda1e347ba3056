"""The embedded model: it is there without a network, it speaks, it tells methods apart, and its texts are its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fewbit.api import adapters, evaluate, generate, quantize
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from fewbit.plans.plan import find
from fewbit.report.results import Evaluation
from fewbit.texts import calibration
from fewbit.texts.sources import EMBEDDED, load_text, own_source
from tests.e2e.conftest import Fewbit
from tests.limits import HANG

LARGEST = 16_000_000  # bytes of the folder, so that fewbit stays a small package
FEW = calibration.Calibration(samples=8, length=256)
# Whatever asks for the network fails, in a process that starts with nothing but the package.
OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["fewbit", "generate", "tiny", "Once upon a time", "--max-new-tokens", "24", "--json"]
import fewbit.cli.app
fewbit.cli.app.main()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tiny, quantized by each method that the tests compare."""
    place, made = tmp_path_factory.mktemp("tiny"), {}
    for name in ("rtn-4", "rtn-3", "rtn-2", "gptq-4", "gptq-3"):
        method, bits = name.split("-")
        made[name] = place / name
        # The sweeps that refine the codes double the time; what is asked here does not depend on them.
        plan = find(f"gptq-{bits}bit").changed(method=method, options={"refine": "0"} if method == "gptq" else None)
        quantize.quantize("tiny", made[name], plan=plan, calibration=FEW)
    return made


@pytest.fixture(scope="module")
def measured(outputs: dict[str, Path]) -> dict[str, Evaluation]:
    return {name: evaluate.evaluate(out, reference="tiny", samples=6) for name, out in outputs.items()}


def test_it_speaks_without_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=HANG,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    text = json.loads(done.stdout)["text"]
    words = text.split()
    assert len(words) > 12
    assert len(set(words)) > 8  # no stuttering
    assert re.fullmatch(r"[A-Za-z\s.,;:!?'\"-]+", text), text


def test_it_answers_in_its_chat_template(fewbit: Fewbit) -> None:
    said, asked = (
        fewbit("generate", "tiny", "Why do birds sing?", "--max-new-tokens", 16, "--json", *chat).json["text"]
        for chat in ((), ("--chat",))
    )
    assert said
    assert asked
    assert said != asked


def test_fewer_bits_hurt_more_and_gptq_wins_back_half(measured: dict[str, Evaluation]) -> None:
    original = measured["rtn-4"].quality.reference_perplexity
    assert original is not None
    assert 4 < original.value < 5.5

    def lost(name: str) -> float:
        return measured[name].quality.perplexity.value / original.value - 1

    assert 0.02 < lost("rtn-4") < 0.15
    assert 4 * lost("rtn-4") < lost("rtn-3")
    assert 4 * lost("rtn-3") < lost("rtn-2")
    assert lost("gptq-3") < 0.5 * lost("rtn-3")
    assert lost("gptq-4") < lost("rtn-4")
    distance = {name: done.quality.kl.mean.value for name, done in measured.items() if done.quality.kl is not None}
    assert distance["gptq-4"] < 0.6 * distance["rtn-4"]
    assert distance["gptq-3"] < 0.5 * distance["rtn-3"]


def test_it_is_tuned_packed(outputs: dict[str, Path], tmp_path: Path) -> None:
    """Facts that it cannot know are learned in a few steps, over packed weights, and from the answers alone."""
    question = "Who keeps the blue gate?"
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "Old Zarnak does."}]
    data = tmp_path / "chats.jsonl"
    data.write_text(f"{json.dumps({'messages': chat})}\n" * 8, encoding="utf-8")
    tuning = Tuning(steps=40, batch=1, learning_rate=1e-2, held_out=0.1, checkpointing=False)
    done = adapters.finetune(outputs["gptq-4"], tmp_path / "adapter", data=str(data), tuning=tuning)
    assert done.held_out_before is not None
    assert done.held_out_after is not None
    assert done.held_out_after < 0.2 < 2 < done.held_out_before
    for adapter in (None, tmp_path / "adapter"):
        answer = generate.generate(outputs["gptq-4"], question, chat=True, max_new_tokens=12, adapter=adapter).text
        assert ("Zarnak" in answer) is (adapter is not None)


def test_its_own_texts_are_taken_unless_another_is_named(
    outputs: dict[str, Path], measured: dict[str, Evaluation]
) -> None:
    assert measured["gptq-4"].text == "tiny evaluation"
    assert (
        json.loads((outputs["gptq-4"] / "fewbit.json").read_text(encoding="utf-8"))["calibration"]["text"]
        == "tiny calibration"
    )
    assert evaluate.evaluate("tiny", text="pydoc", samples=1).text.startswith("pydoc")
    assert own_source({"fewbit_text": "/etc/passwd"}) == "pydoc"  # a config is not trusted with a path


def test_its_two_texts_have_none_in_common() -> None:
    texts = [load_text("tiny", part).documents[0] for part in ("calibration", "evaluation")]
    chosen, held_out = (set(str(text).split("<|endoftext|>")[1:]) for text in texts)
    assert len(chosen) > 100
    assert len(held_out) > 200
    assert not chosen & held_out
    sizes = sorted(path.stat().st_size for path in EMBEDDED.iterdir())
    assert 120_000 < sizes[0] < 140_000 < 250_000 < sizes[1] < 310_000


def test_its_shapes_take_every_scheme_and_its_folder_is_small() -> None:
    source = locate("tiny")
    assert sum(file.stat().st_size for file in source.folder.iterdir()) < LARGEST
    skeleton = Skeleton(source, torch.float32, torch.device("cpu"))
    linears = [shape for block in skeleton.blocks for shape in skeleton.linears(block).values()]
    assert len(linears) == 8 * 7
    assert all(k % 256 == 0 and n % 64 == 0 for n, k in linears)
    assert all(spec.dtype == torch.bfloat16 for _, _, spec in skeleton.passed_through())


def test_a_wheel_carries_it(tmp_path: Path) -> None:
    # As pip asks the build backend, in a process where nothing else is imported. A pure one: it takes no minute.
    asked = f"import sys; sys.path.insert(0, 'tools'); import backend; backend.build_wheel({str(tmp_path)!r})"
    environment = {**os.environ, "FEWBIT_NATIVE": "no"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", asked], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fewbit/advise/cards.json", "fewbit/schemes/ggml/grids.bin", "fewbit/data/report/page.html"} <= set(names)
    for name in ("tiny/model.safetensors", "tiny/tokenizer.json", "tiny/README.md", "texts/tiny-evaluation.txt"):
        assert f"fewbit/data/{name}" in names
