"""Sizes before there is a model: what follows from a config.json, from a number of parameters, and what holds it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import fewbit
from fewbit import FormatError, PlanError
from fewbit.advise import cards, memory
from fewbit.api import advise
from fewbit.models import source
from fewbit.models.outline import Geometry, geometry
from fewbit.models.source import locate
from fewbit.plans import plan
from fewbit.stats import Need
from tests import architectures, models

SMALL = Geometry(
    layers=2, hidden=64, rows=64, values=32, inner=128, vocab=1000, context=256, windows=(0, 16)
)  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder that holds tiny's config.json and nothing else."""
    shutil.copy(locate("tiny").folder / "config.json", tmp_path)
    return tmp_path


def test_a_config_alone_tells_what_the_weights_would(bare: Path) -> None:
    from_weights = fewbit.estimate("tiny")
    for name in (bare, bare / "config.json"):
        imagined = fewbit.estimate(name)
        assert imagined.imagined
        assert not from_weights.imagined
        assert imagined.plans == from_weights.plans
        assert imagined.parameters == from_weights.parameters == 7_344_384


def test_of_a_hub_name_the_config_alone_is_downloaded(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(bare)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert fewbit.estimate("org/model", plan="nf4").imagined
    assert asked == [["config.json"]]


@pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
@pytest.mark.parametrize("kind", ["mamba2", "gemma4_text", "qwen3_moe", "nemotron_h"])
def test_hybrids_and_models_without_attention(kind: str, tmp_path: Path) -> None:
    config = architectures.config(kind)
    config.save_pretrained(tmp_path)
    sizes = fewbit.estimate(tmp_path, plan="nf4")
    assert sizes.imagined
    assert (geometry(config, 128).rows == 0) is (kind == "mamba2")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2-bare", "opt"])
def test_architectures_from_their_config(family: str, tmp_path: Path) -> None:
    whole = models.save(tmp_path / "whole", family)
    (tmp_path / "bare").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "bare")
    assert fewbit.estimate(tmp_path / "bare").plans == fewbit.estimate(whole).plans


def test_every_preset_is_there_and_the_original_first() -> None:
    assert [row.plan for row in fewbit.estimate("tiny").plans] == ["bf16", *plan.PRESETS]


def test_a_plan_that_cannot_be_says_why_and_others_go_on(bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    (bare / "config.json").write_text(
        json.dumps(config | {"model_type": "helium", "architectures": None}), encoding="utf-8"
    )
    rows = {row.plan: row for row in fewbit.estimate(bare).plans}
    assert "no GGUF file can be made" in (rows["q4_k_m"].why_not or "")
    assert rows["nf4"].why_not is None
    assert rows["nf4"].total > 0


def test_cache_counts_key_value_heads_windows_and_type() -> None:
    use = memory.Use(context=100, batch=3)
    assert memory.cache_bytes(SMALL, use) == 3 * (100 + 16) * 2 * 32 * 2
    assert memory.cache_bytes(SMALL, memory.Use(context=100, batch=3, cache="float32")) == 3 * 116 * 2 * 32 * 4
    with pytest.raises(PlanError, match=r"cache='int3': expected a type of a KV cache: float32, bf16, .*q4_0"):
        fewbit.estimate("tiny", cache="int3")


def test_peaks_follow_the_stated_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    use = memory.Use(context=100, activation=4)
    assert memory.activation_peak(SMALL, use, packed=False) == 100 * 4 * (3 * 64 + 3 * 128) + 1000 * 8
    linears = {"b.q": (64, 64), "b.k": (32, 64), "b.o": (64, 64), "m.up": (128, 64), "m.down": (64, 128)}
    block = memory.Block(50_000, linears)
    work, device = memory.Work(Need.HESSIAN, 8, 100, 4.125, 0), memory.Device(4, 0)
    hessians = 4 * (3 * 64 * 64 + 128 * 128)
    replay = 2 * 800 * 4 * (3 * 64 + 3 * 128)
    packed = round(4.125 / 8 * sum(n * k for n, k in linears.values()))
    peak = 4 * 50_000 + packed + 4 * 800 * 64 + hessians + replay + 24_000_000
    assert memory.quantization_peak(SMALL, block, work, device) == peak
    compared = replace(work, need=Need.SHIFT)
    read = 800 * 4 * (3 * 64 + 128)  # what q and k, o, up, and down read
    with_target = peak + 2 * 4 * 800 * 64 + 3 * hessians + read
    assert memory.quantization_peak(SMALL, block, compared, device) == with_target
    with monkeypatch.context() as patch:  # no room for it: one batch of it, and the block
        patch.setattr(memory, "room_for_statistics", lambda _: 4 * hessians)
        patch.setattr(memory, "_BATCH", 100)
        less = 2 * 700 * 4 * (3 * 64 + 3 * 128) + 7 * read // 8
        assert memory.quantization_peak(SMALL, block, compared, device) == with_target + 4 * 50_000 - less
    on_gpu = 2 * 50_000 + 2 * 800 * 64 + hessians + replay // 2 + 24_000_000
    assert memory.quantization_peak(SMALL, block, work, memory.Device(2, 0, gpu=True)) == on_gpu
    assert memory.host_peak(block, work) == packed + 1_100_000_000
    assert memory.quantization_peak(SMALL, block, replace(work, need=Need.NOTHING), device) < peak


# Layers of Qwen3-30B-A3B's and DeepSeek-V3's shapes: benchmarks/results/2026-11-experts.md
def layer(attention: dict[str, tuple[int, int]], experts: int, hidden: int, inner: int) -> memory.Block:
    linears = {f"l.self_attn.{name}": shape for name, shape in attention.items()}
    for expert in range(experts):
        linears |= {f"l.mlp.experts.{expert}.{leaf}": (inner, hidden) for leaf in ("gate_proj", "up_proj")}
        linears[f"l.mlp.experts.{expert}.down_proj"] = (hidden, inner)
    return memory.Block(sum(n * k for n, k in linears.values()), linears, experts=True)


CPU, H100 = memory.Device(4, 23 << 30), memory.Device(2, 79 << 30, gpu=True)
QWEN_LAYER = layer({"q": (4096, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 4096)}, 128, 2048, 768)
MLA = {"q_a": (1536, 7168), "q_b": (24576, 1536), "kv_a": (576, 7168), "kv_b": (32768, 512), "o": (7168, 16384)}
DEEPSEEK_LAYER = layer(MLA, 257, 7168, 2048)  # the shared expert has the shape of another one
QWEN = Geometry(1, 2048, 4096, 512, 6144, 4096, 4096, (0,)), QWEN_LAYER
DEEPSEEK = Geometry(1, 7168, 8192, 8192, 18432, 4096, 4096, (0,)), DEEPSEEK_LAYER


@pytest.mark.parametrize(
    ("model", "work", "device", "measured"),
    [
        (QWEN, (Need.NOTHING, 8, 512, 4.127), CPU, 2_899_877_888),
        (QWEN, (Need.HESSIAN, 8, 512, 4.125), CPU, 5_330_522_112),
        (QWEN, (Need.HESSIAN, 128, 2048, 4.125), H100, 5_843_460_096),
        (DEEPSEEK, (Need.NOTHING, 16, 2048, 4.127), H100, 23_846_936_576),
        (DEEPSEEK, (Need.HESSIAN, 16, 2048, 4.125), H100, 35_083_675_648),
    ],
)
def test_peaks_of_layers_of_experts_as_measured(
    model: tuple[Geometry, memory.Block],
    work: tuple[Need, int, int, float],
    device: memory.Device,
    measured: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_BATCH_OF_EXPERTS", 16384)  # the batch of the measurement
    estimated = memory.quantization_peak(*model, memory.Work(*work, packed_bytes=0), device)
    assert estimated == pytest.approx(measured, rel=0.25), f"{estimated / measured - 1:+.1%}"


@pytest.mark.parametrize(
    ("block", "bits", "measured"),
    [
        (QWEN_LAYER, 4.125, 1_693_597_696),
        (DEEPSEEK_LAYER, 4.127, 6_480_203_776),
        (DEEPSEEK_LAYER, 4.125, 7_038_054_400),
    ],
)
def test_main_memory_beside_a_gpu_as_measured(block: memory.Block, bits: float, measured: int) -> None:
    estimated = memory.host_peak(block, memory.Work(Need.HESSIAN, 16, 2048, bits, 0))
    assert estimated == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("size", "gigabytes"), [("7B", 28), ("13B", 52), ("70B", 280), ("1.1b", 4.4), ("125M", 0.5)])
def test_the_rule_of_thumb(size: str, gigabytes: float) -> None:
    table = advise.estimate_size(size)
    assert table is not None
    by = {row.name: row.nbytes for row in table.guide}
    assert by["FP32"] == pytest.approx(gigabytes * 1e9)
    assert by["FP16"] == by["FP32"] / 2 == by["INT8"] * 2 == by["INT4"] * 4


def test_true_bits_stand_beside() -> None:
    table = advise.estimate_size("7B")
    assert table is not None
    bits = {row.name.split()[0]: row.bits for row in table.formats}
    assert bits["gptq-4bit"] == 4.125
    assert bits["awq-4bit"] == 4.15625
    assert bits["q4_k"] == 4.5
    assert bits["nf4"] == pytest.approx(4.127, abs=1e-3)
    assert advise.estimate_size("tiny") is None
    with pytest.raises(PlanError, match="no number of parameters"):
        advise.estimate_size("0B")


def test_a_size_is_no_model() -> None:
    with pytest.raises(PlanError, match="7B is a size, not a model") as raised:
        advise.estimate("7B")
    assert raised.value.hint == "Call fewbit.api.advise.estimate_size('7B'), which takes one."


@pytest.mark.parametrize(("name", "said"), [("7X", True), ("7", True), ("1.1GB", True), ("gpt2", False)])
def test_what_looks_like_a_size_is_told_of_sizes(name: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("No connection.")

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(PlanError, match=f"model {name}: no such folder here") as raised:
        advise.estimate(name)
    assert ("write it as 7B, 1.1B or 125M" in raised.value.hint) == said


def test_cards_are_sorted_and_sourced() -> None:
    found = cards.cards()
    assert [card.memory for card in found] == sorted(card.memory for card in found)
    assert all("https://" in card.source for card in found)
    assert cards.smallest(14 * 10**9) == "T4, 16 GB"
    assert cards.smallest(10**15) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 513}, "beyond the model's context"),
        ({"batch": 0}, "batch=0"),
        ({"plan": "q4"}, "unknown"),
    ],
)
def test_what_cannot_be_estimated(options: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        fewbit.estimate("tiny", **options)  # type: ignore[arg-type]


def test_what_cannot_be_estimated_of_a_quantized_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewbit.quantize("tiny", out, plan="nf4", progress=False)
    assert [row.plan for row in fewbit.estimate(out, context=512).plans] == ["as it is"]
    with pytest.raises(PlanError, match=r"context=513.* is beyond the model's context of 512 tokens"):
        fewbit.estimate(out, context=513)
    with pytest.raises(PlanError, match="quantized already, and its estimate is for the model as it is"):
        fewbit.estimate(out, plan="nf4")


def test_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(FormatError, match="does not contain a JSON object"):
        fewbit.estimate(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": -3}', encoding="utf-8")
    with pytest.raises(FormatError):
        fewbit.estimate(tmp_path)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PlanError, match=r"not a config\.json"):
        fewbit.estimate(tmp_path / "other.json")


def test_a_quantized_config_without_weights_is_refused(bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    (bare / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}), encoding="utf-8"
    )
    with pytest.raises(PlanError, match="its weights are not here"):
        fewbit.estimate(bare)
