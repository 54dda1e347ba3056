"""The KL divergence of an output of a chosen size: predicted by that of other outputs, and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit as package
from fewbit.errors import PlanError
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.pipeline import budgeted
from fewbit.pipeline.job import held_out, windows
from fewbit.plans.budget import Budget
from fewbit.plans.correction import Correction
from fewbit.system import ranks
from tests import models as tiny_models
from tests.e2e.conftest import Fewbit

CURVE = ("factor", "exponent", "least")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with its first two blocks only: a trained model, whose costs are measured in seconds."""
    tiny = locate("tiny").folder
    folder = tmp_path_factory.mktemp("short")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:2]
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    return folder


def exact_divergence(model: Path, out: Path, tokens: Tensor) -> float:
    """KL divergence from the logits of the two models as transformers computes them, in float64."""
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
        two = package.load(out, device="cpu", dtype="float32")(tokens).logits
    log_p, log_q = one.double().log_softmax(-1), two.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def held_of(model: Path, calibration: package.Calibration) -> tuple[package.Calibration, Tensor]:
    source = locate(model)
    return held_out(calibration, source, load_tokenizer(source))


@pytest.mark.parametrize(("plan", "tied"), [("rtn-4bit", False), ("q4_k_m", False), ("q4_k_m", True)])
def test_it_is_that_of_the_written_output(tmp_path: Path, plan: str, tied: bool) -> None:
    """Blocks, embedding and head: the same number from the model that is loaded from the files."""
    (tmp_path / "text.txt").write_text(tiny_models.sentences(40), encoding="utf-8")
    model = tiny_models.save(tmp_path / "m", "llama", vocab_size=320, tie_word_embeddings=tied, dtype="float32")
    calibration = package.Calibration(str(tmp_path / "text.txt"), samples=4, length=32)
    out = tmp_path / ("out.gguf" if plan == "q4_k_m" else "out")
    done = package.quantize(model, out, plan=plan, budget=Budget(bits=5), calibration=calibration).allocation
    assert done is not None
    assert done.measured is not None
    _, tokens = held_of(model, calibration)
    assert done.held_out == tokens.numel()
    assert done.measured == pytest.approx(exact_divergence(model, out, tokens), rel=1e-4)


def test_a_third_size_is_predicted_within_10_percent(short: Path, tmp_path: Path) -> None:
    """The sum of costs alone is further off: errors of that size disturb one another."""
    calibration = package.Calibration("tiny", samples=16, length=128)
    done = package.quantize(
        short, tmp_path / "out", plan="rtn-4bit", budget=Budget(bits=3.4), calibration=calibration
    ).allocation
    assert done is not None
    assert done.measured is not None
    measured = [point for point in done.curve if point.measured is not None]
    assert len(measured) == 3
    assert done.kl == pytest.approx(done.measured, rel=0.1)
    assert done.costs < 0.9 * done.measured


def test_both_numbers_are_printed_and_stored(short: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    out = tmp_path / "out"
    few = ("--plan", "rtn-4bit", "--calibration", "tiny", "--samples", "16", "--length", "128")
    shown = fewbit("quantize", short, "--bits", 3.4, *few, "--dry-run")
    assert shown.err.startswith("note: to choose widths, the model is quantized at each of them")
    assert shown.code == 0
    assert "KL divergence: predicted " in shown.out
    assert ", measured" not in shown.out
    printed = fewbit("quantize", short, "--bits", 3.4, *few, "-o", out).out
    record = json.loads((out / "fewbit.json").read_text(encoding="utf-8"))["allocation"]
    assert record["kl"] != record["measured"]
    assert f"predicted {record['kl']:.3g}, measured {record['measured']:.3g} nats per token" in " ".join(
        printed.split()
    )
    assert [point["measured"] for point in record["curve"] if point["chosen"]] == [record["measured"]]
    assert sum(point["measured"] is not None for point in record["curve"]) == 3
    assert record["kl"] == pytest.approx(Correction(*(record[k] for k in CURVE))(record["costs"]))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"predicted {record['kl']:.3g}, measured {record['measured']:.3g} on 4,096 held-out tokens" in card


def test_points_are_measured_once_for_all_sizes(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = package.Calibration("tiny", samples=16, length=128)
    package.preview(short, plan="rtn-4bit", budget=Budget(bits=3.4), calibration=calibration)
    monkeypatch.setattr(budgeted, "quantize_blocks", None)
    other = package.preview(short, plan="rtn-4bit", budget=Budget(size="5MB"), calibration=calibration).allocation
    assert other is not None
    assert sum(point.measured is not None for point in other.curve) == 2


@pytest.mark.parametrize(
    ("samples", "fitted", "held"),
    [
        (2, 2, 64),  # 4096 tokens, of windows that calibration does not use
        (500, 461, 64),  # all windows of the text: an eighth of them
    ],
)
def test_held_out_windows_are_not_calibrated_on(samples: int, fitted: int, held: int) -> None:
    source = locate("tiny")
    tokenizer = load_tokenizer(source)
    wanted = package.Calibration("tiny", samples=samples, length=64)
    used, tokens = held_out(wanted, source, tokenizer)
    assert (used.samples, len(tokens)) == (fitted, held)
    own = {tuple(window) for window in windows(used, source, tokenizer)[0].tolist()}
    assert not own & {tuple(window) for window in tokens.tolist()}


def test_a_text_of_one_window_is_measured_itself() -> None:
    source = locate("tiny")
    wanted = package.Calibration(["word " * 70], samples=3, length=64)
    used, tokens = held_out(wanted, source, load_tokenizer(source))
    assert (used.samples, len(tokens)) == (1, 1)


def test_several_processes_are_refused(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(PlanError, match="widths are chosen by one process"):
        package.preview(short, plan="rtn-4bit", budget=Budget(bits=3.4))
