"""An output has the size that was asked for, and its plan can be used again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import ArgumentError, PlanError
from fewbit.pipeline import budgeted, costs
from fewbit.pipeline.settled import Settled
from fewbit.plans.budget import Budget
from fewbit.schemes.base import Scheme
from tests import models as tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(tiny_models.sentences(60), encoding="utf-8")
    return tiny_models.save(folder / "m", "llama", vocab_size=320, tie_word_embeddings=False, dtype="float32")


def made(model: Path, out: Path, plan: str, **budget: Any) -> fewbit.Quantized:
    calibration = fewbit.Calibration(str(model.parent / "text.txt"), samples=4, length=32)
    return fewbit.quantize(model, out, plan=plan, budget=Budget(**budget), calibration=calibration)


@pytest.mark.parametrize("plan", ["gptq-4bit", "w4a16", "rtn-4bit"])
def test_bits_are_an_average_over_quantized_weights(model: Path, tmp_path: Path, plan: str) -> None:
    done = made(model, tmp_path / "out", plan, bits=4.6)
    assert 4.4 < done.bits_per_weight <= 4.6
    assert done.allocation is not None
    assert done.allocation.bits == done.bits_per_weight
    assert len(done.allocation.schemes) > 1
    record = json.loads((tmp_path / "out/fewbit.json").read_text(encoding="utf-8"))
    assert record["allocation"]["kl"] == done.allocation.kl > 0
    again = fewbit.quantize(
        model,
        tmp_path / "again",
        plan=tmp_path / "out/fewbit.json",
        calibration=fewbit.Calibration(str(model.parent / "text.txt"), samples=4, length=32),
    )
    assert {t.module: t.scheme for t in again.tensors} == {t.module: t.scheme for t in done.tensors}
    one, other = (tiny_models.tensors_of(tmp_path / name) for name in ("out", "again"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_transformers_loads_a_gptq_folder_of_many_widths(model: Path, tmp_path: Path) -> None:
    done = made(model, tmp_path / "out", "gptq-4bit", bits=4.6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for tensor in done.tensors:
        assert str(loaded.get_submodule(tensor.module).codec) == tensor.scheme
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    usual = f"int{config['bits']}-g{config['group_size']}-sym"
    for tensor in done.tensors:
        hit = [value for key, value in config["dynamic"].items() if re.match(key.removeprefix("+:"), tensor.module)]
        assert bool(hit) == (tensor.scheme != usual)
        fused = re.sub(r"[qkv]_proj$", "qkv_proj", re.sub(r"(gate|up)_proj$", "gate_up_proj", tensor.module))  # in vLLM
        assert hit == [v for key, v in config["dynamic"].items() if re.match(key.removeprefix("+:"), fused)]


@pytest.mark.parametrize("plan", ["gptq-4bit", "w4a16", "q4_k_m"])
def test_files_are_no_larger_than_asked(model: Path, tmp_path: Path, plan: str) -> None:
    out = tmp_path / ("out.gguf" if plan == "q4_k_m" else "out")
    with pytest.raises(PlanError, match=r"the smallest output of plan .* takes .* \(([\d,]+) bytes\)") as error:
        made(model, out, plan, size=1000)
    found = re.search(r"\(([\d,]+) bytes\)", error.value.message)
    assert found is not None
    least = int(found[1].replace(",", ""))
    for size in (least, least + 20_000):
        done = made(model, out.with_stem(f"out{size}"), plan, size=size)
        place = out.with_stem(f"out{size}")
        files = [place] if place.is_file() else list(place.glob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) <= size
        assert done.allocation is not None
        assert done.allocation.output_bytes == done.output_bytes


def test_a_card_holds_what_estimate_says(model: Path, tmp_path: Path) -> None:
    now = fewbit.estimate(model, plan="gptq-4bit", context=64).plans[1]
    made(model, tmp_path / "out", "gptq-4bit", fit=now.total + 3000, context=64)
    made_of = fewbit.estimate(model, plan=tmp_path / "out/fewbit.json", context=64).plans[1]
    assert now.total < made_of.total <= now.total + 3000


def test_recommend_tells_what_fills_a_memory(model: Path) -> None:
    """With measured costs, it tells the widths, size and loss of the file that `quantize --fit` makes."""
    limit = fewbit.estimate(model, plan="gptq-4bit", context=64).plans[1].total + 3000
    windows = fewbit.Calibration(str(model.parent / "text.txt"), samples=4, length=32)
    options: dict[str, Any] = {"fit": limit, "context": 64, "target": "vllm"}
    expected = fewbit.recommend(model, "serving", **options).fitted
    found = fewbit.recommend(model, "serving", **options, measure=True, calibration=windows)
    assert expected is not None
    assert found.fitted is not None
    assert expected.total <= limit
    assert found.fitted.basis == "costs"
    assert not any("--dry-run" in command for command in found.commands)
    given = f"--context 64 --calibration {windows.text} --samples 4 --length 32"
    assert any(command.startswith("fewbit quantize") and command.endswith(given) for command in found.commands)
    budget = Budget(fit=limit, context=64)
    made_of = fewbit.preview(model, plan=found.fitted.plan, budget=budget, calibration=windows).allocation
    assert made_of is not None
    told = found.fitted
    assert (told.kl, told.bits, told.schemes) == (made_of.kl, made_of.bits, made_of.schemes)
    assert 0.97 * expected.total < told.total <= expected.total
    assert told.total - expected.total == told.weights_bytes - expected.weights_bytes


def test_more_than_the_largest_is_said(model: Path, tmp_path: Path) -> None:
    done = made(model, tmp_path / "out", "gptq-4bit", bits=16)
    assert {tensor.scheme for tensor in done.tensors} == {"int8-g32-sym"}
    assert any("`bits=16.0` is above the largest output" in note for note in done.notes)


def test_a_preview_shows_the_curve_and_measures_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = fewbit.Calibration(str(model.parent / "text.txt"), samples=4, length=32)
    before = set(tmp_path.iterdir())
    shown = fewbit.preview(model, budget=Budget(bits=4.6), calibration=calibration)
    assert set(tmp_path.iterdir()) == before
    assert shown.allocation is not None
    assert [point.chosen for point in shown.allocation.curve].count(True) == 1
    assert {"int4-g32-sym", "int8-g32-sym"} <= {point.what for point in shown.allocation.curve}
    hull = [point for point in shown.allocation.curve if not point.what]
    assert [point.kl for point in hull] == sorted((point.kl for point in hull), reverse=True)
    monkeypatch.setattr(costs, "measured", None)
    again = fewbit.preview(model, budget=Budget(bits=4.0), calibration=calibration)
    assert again.allocation is not None
    assert again.allocation.kl > shown.allocation.kl
    (tmp_path / "plan.json").write_text(json.dumps({"definition": again.definition}), encoding="utf-8")
    assert fewbit.preview(model, plan=tmp_path / "plan.json").output_bytes == again.output_bytes


@pytest.mark.parametrize(("plan", "offered"), [("iq2_m", True), ("q2_k", False)])
def test_a_plan_of_iq_types_has_them_as_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, offered: bool
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320}
    model = tiny_models.save(tmp_path / plan, "llama", **sizes, tie_word_embeddings=False, dtype="float32")

    def measured(settled: Settled, options: Mapping[str, Sequence[Scheme]], *_: Any) -> costs.Costs:
        shapes = {module: a.shape for module, a in settled.resolved.assignments.items()}
        loss = {m: {str(s): 4.0 ** -(s.nbytes(shapes[m]) / 65536 * 8) for s in each} for m, each in options.items()}
        return costs.Costs(loss, {}, 128)

    monkeypatch.setattr(costs, "measured", measured)
    (tmp_path / "text.txt").write_text(tiny_models.sentences(60), encoding="utf-8")
    calibration = fewbit.Calibration(str(tmp_path / "text.txt"), samples=4, length=32)
    shown = fewbit.preview(model, plan=plan, budget=Budget(bits=2.8), calibration=calibration)
    assert shown.allocation is not None
    assert not any("no fast kernel" in note for note in shown.notes)
    # As on a GPU, which has no fast kernels for them
    monkeypatch.setattr(budgeted, "_slow", lambda settled, module, scheme: scheme.startswith(("iq2", "iq3")))
    shown = fewbit.preview(model, plan=plan, budget=Budget(bits=2.8), calibration=calibration)
    assert shown.allocation is not None
    iq = [name for name in shown.allocation.schemes if name.startswith(("iq2", "iq3"))]
    assert bool(iq) == offered
    assert 2.75 < shown.allocation.bits <= 2.8
    slow = [note for note in shown.allocation.notes if "no fast kernel" in note]
    assert [all(name in note for name in iq) for note in slow] == [True] * offered
    assert set(slow) <= set(shown.notes)


@pytest.mark.parametrize(
    ("plan", "budget", "message"),
    [
        ("gptq-4bit", {"bits": 2}, "bits=2.0 is too small: .* takes 2.500 bits per weight"),
        ("gptq-4bit", {"fit": "1kB"}, "fit=1000 is too small"),
        ("gptq-4bit", {"fit": "1GB", "context": 1_000_000}, "context=1000000 is beyond the model's context of"),
        ("awq-4bit", {"bits": 4.5}, "awq files store .* in one width only"),
        ("nf4", {"size": "1GB"}, "bnb files store .* in one width only"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, budget: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(costs, "measured", None)
    with pytest.raises(PlanError, match=message):
        made(model, tmp_path / "out", plan, **budget)
    assert not (tmp_path / "out").exists()


def test_group_sizes_that_one_file_cannot_mix_are_no_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An awq config has one group size, although awq stores groups of 32 and of 128."""
    monkeypatch.setattr(costs, "measured", None)
    with pytest.raises(PlanError, match="awq files store int4-g128 in one width only"):
        fewbit.quantize("tiny", tmp_path / "out", plan="awq-4bit", budget=Budget(bits=4.3))


def test_one_limit_is_given() -> None:
    with pytest.raises(PlanError, match="`bits` and `size` are given"):
        Budget(bits=4, size="1GB")
    with pytest.raises(PlanError, match="`context` is given without `fit`") as refused:
        Budget(bits=4, context=100)
    assert refused.value.hint == "Omit `context`, or add `fit`: only `fit` counts a KV cache."
    with pytest.raises(PlanError, match="size='huge'"):
        Budget(size="huge")
    for bits in (0, 16.1):
        with pytest.raises(ArgumentError, match="a number above 0"):
            Budget(bits=bits)
