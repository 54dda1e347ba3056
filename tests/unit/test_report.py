"""Numbers for people, and the text of model cards, progress lines and tables."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from fewbit import units
from fewbit.advise.doctor import Hardware
from fewbit.measure.intervals import Interval
from fewbit.measure.quality import Divergence, Quality
from fewbit.models.describe import Inspection
from fewbit.pipeline.job import Preview
from fewbit.pipeline.run import TensorReport
from fewbit.plans.catalogue import Entry
from fewbit.report import card as report_card
from fewbit.report import text as report_text
from fewbit.report.results import Converted, Evaluation, Quantized, Tuned


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on stdout."""
    buffer = io.StringIO()
    monkeypatch.setattr(report_text, "out", Console(file=buffer, width=160, highlight=False))
    return buffer


QUALITY = Quality(
    tokens=12345,
    windows=8,
    length=512,
    perplexity=Interval(33.456, 32.1, 34.8),
    reference_perplexity=Interval(29.2, 28.0, 30.5),
    perplexity_ratio=Interval(1.1457, 1.13, 1.16),
    kl=Divergence(
        mean=Interval(0.152, 0.14, 0.16),
        median=Interval(0.08, 0.07, 0.09),
        p99=Interval(1.1, 1.0, 1.2),
        p999=Interval(3.1, 2.5, 4.0),
        max=7.25,
    ),
    same_top=Interval(0.8123, 0.80, 0.82),
)
INSPECTION = Inspection(
    name="out",
    architecture="LlamaForCausalLM",
    format="gptq",
    schemes={"int4-g64-sym": 210},
    parameters=134_515_008,
    quantized_parameters=106_168_320,
    weights_bytes=113_000_000,
    file_bytes=114_000_000,
    bits_per_weight=6.72,
    bits_per_weight_quantized=4.25,
    made={},
)
EVALUATION = Evaluation(
    model="out",
    reference="smollm2",
    text="pydoc evaluation",
    quality=QUALITY,
    inspection=INSPECTION,
    peak=1_234_000_000,
    gpu_peak=0,
    seconds=75.4,
    available=53,
)
TENSORS = [
    TensorReport("model.layers.0.q", (64, 64), "int4-g32-sym", "GPTQ", 2304, 0.001),
    TensorReport("model.layers.1.q", (64, 64), "int4-g32-sym", "GPTQ", 2304, 0.003, 0, ["damping raised"]),
    TensorReport("model.layers.2.q", (64, 64), "int4-g32-sym", "GPTQ", 2304, 0.002, 0, ["damping raised"]),
]
QUANTIZED = Quantized(
    out="/somewhere/out",
    plan="gptq-4bit",
    notes=["groups of 32 instead of 128"],
    tensors=TENSORS,
    original_bytes=10_000,
    output_bytes=4_000,
    bits_per_weight=4.5,
    share=0.9958,
    seconds=125,
    peak=10**9,
    gpu_peak=0,
    anonymous=10**8,
    sample=" cat sat",
)


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (98_400_000, "98.4 MB"),
        (999_000_000, "999 MB"),
        (1_230_000_000, "1.23 GB"),
        (2_500_000_000_000, "2,500 GB"),
    ],
)
def test_sizes(nbytes: int, words: str) -> None:
    assert units.size(nbytes) == words


@pytest.mark.parametrize("nbytes", [999_600, 999_999, 999_999_999, 9_995, 99_950_000])
def test_a_size_is_never_written_with_an_exponent(nbytes: int) -> None:
    assert "e" not in units.size(nbytes)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (0.4217, "0.42 s"), (9.4, "9.4 s"), (37.2, "37 s"), (59.9, "1 min 00 s"), (125, "2 min 05 s")],
)
def test_durations(seconds: float, words: str) -> None:
    assert units.duration(seconds) == words


def test_intervals() -> None:
    assert report_text.interval(Interval(0.15249, 0.14, 0.161)) == ("0.152", "0.14 ... 0.161")
    assert report_text.interval(Interval(0.8123, 0.8, 0.82), percent=True) == ("81.23%", "80.00% ... 82.00%")


def test_an_evaluation_for_people(shown: io.StringIO) -> None:
    report_text.evaluation(EVALUATION)
    text = shown.getvalue()
    for words in (
        "out against smollm2, on 12,345 tokens of pydoc evaluation in 8 of 53 windows of 512",
        "33.46",
        "29.2",
        "0.152",
        "0.14 ... 0.16",
        "7.25",
        "81.23%",
        "113 MB",
        "4.250",
        "1.23 GB",
        "of this evaluation, both models held",
        "1 min 15 s",
    ):
        assert words in text


def test_tuning_that_stopped_early_says_why(shown: io.StringIO) -> None:
    done = Tuned(
        out="tuned",
        model="out",
        reference="tiny",
        notes=[],
        text="pydoc",
        tokens=100,
        held_out_tokens=10,
        steps=3,
        planned=5,
        best=1,
        before=0.2,
        after=0.1,
        weights=1,
        gains=1,
        trained=2,
        moved=None,
        seconds=1.0,
        peak=1,
        gpu_peak=0,
    )
    report_text.tuned(done)
    report_text.tuned(replace(done, steps=5))
    early, whole = (" ".join(line.split()) for line in shown.getvalue().splitlines() if line.startswith("steps"))
    assert early == "steps 3 of 5: training stopped, the held-out loss no longer fell; the state after step 1 is kept"
    assert whole == "steps 5 the state after step 1 is kept"


def test_an_evaluation_without_reference_compares_nothing(shown: io.StringIO) -> None:
    alone = replace(QUALITY, reference_perplexity=None, perplexity_ratio=None, kl=None, same_top=None)
    report_text.evaluation(replace(EVALUATION, reference=None, quality=alone))
    assert "KL" not in shown.getvalue()
    assert "against" not in shown.getvalue()
    assert "both models" not in shown.getvalue()
    data = report_text.evaluation_json(replace(EVALUATION, reference=None, quality=alone))
    assert all(data[key] is None for key in ("kl", "same_top", "reference_perplexity", "perplexity_ratio"))
    assert data["intervals"] == {"perplexity": [32.1, 34.8]}


def test_a_loss_of_exactly_nothing_is_still_told(shown: io.StringIO) -> None:
    none = Interval(0.0, 0.0, 0.0)
    same = replace(QUALITY, kl=Divergence(none, none, none, none, 0.0), same_top=Interval(1.0, 1.0, 1.0))
    report_text.evaluation(replace(EVALUATION, quality=same))
    assert "KL divergence" in shown.getvalue()
    assert report_text.evaluation_json(replace(EVALUATION, quality=same))["kl"]["mean"] == 0


def test_an_evaluation_for_scripts() -> None:
    data = report_text.evaluation_json(EVALUATION)
    assert data["perplexity"] == 33.456
    assert data["reference_perplexity"] == 29.2
    assert data["kl"] == {"mean": 0.152, "median": 0.08, "p99": 1.1, "p999": 3.1, "max": 7.25}
    assert data["same_top"] == 0.8123
    assert data["tokens"] == 12345
    assert data["weights_bytes"] == 113_000_000
    assert data["bits_per_weight"] == 6.72
    assert data["intervals"]["kl"]["p99"] == [1.0, 1.2]
    assert data["intervals"]["same_top"] == [0.8, 0.82]


@pytest.mark.parametrize(
    ("factor", "said"), [(1.0, "about the same size"), (0.996, "about the same size"), (1.25, "1.25 x larger")]
)
def test_an_output_that_is_no_smaller(factor: float, said: str, shown: io.StringIO) -> None:
    report_text.quantized(replace(QUANTIZED, output_bytes=round(QUANTIZED.original_bytes * factor)))
    assert said in shown.getvalue()
    assert "x smaller" not in shown.getvalue()


def test_a_quantization_for_people(shown: io.StringIO) -> None:
    report_text.quantized(QUANTIZED)
    text = shown.getvalue()
    for words in (
        "note: groups of 32 instead of 128",
        "note: damping raised (model.layers.1.q and 1 more)",
        "2.50 x smaller",
        "4.500",
        "99.6%",
        "2.00e-03",
        "The largest error is 3.00e-03 in model.layers.1.q.",
        "2 min 05 s",
        'with "cat sat"',
    ):
        assert words in text


def test_the_name_of_an_expert_breaks_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    monkeypatch.setattr(report_text, "out", Console(file=buffer, width=80, highlight=False))
    name = "model.language_model.layers.47.mlp.experts.127.gate_proj"
    report_text.quantized(replace(QUANTIZED, tensors=[replace(QUANTIZED.tensors[0], module=name, error=0.25)]))
    lines = buffer.getvalue().splitlines()
    for row in ("weights in files", "bits per quantized weight", "relative output error", "time", "peak memory"):
        assert sum(line.startswith(row) for line in lines) == 1


@pytest.mark.parametrize("said_by_model", ["[/b] [red]", "[bold", "\\[x]", "[/]"])
def test_what_a_model_says_is_not_markup(said_by_model: str, shown: io.StringIO) -> None:
    report_text.quantized(replace(QUANTIZED, sample=said_by_model))
    assert f'"{said_by_model.strip()}"' in shown.getvalue()


def test_a_folder_with_brackets_is_shown_as_it_is(shown: io.StringIO) -> None:
    report_text.quantized(replace(QUANTIZED, out="/somewhere/[red]/out", notes=["about [/this]"]))
    assert "/somewhere/[red]/out" in shown.getvalue()
    assert "about [/this]" in shown.getvalue()


def test_a_conversion_without_quantized_weights(shown: io.StringIO) -> None:
    """Such as a LoRA in a GGUF file."""
    report_text.converted(Converted("lora.gguf", "gguf", True, {}, [], [], 1_000_000, 1_000_000, 2.0, 5))
    assert shown.getvalue().startswith("lora.gguf: gguf, unquantized weights; 1 MB became 1 MB;")


def test_large_unquantized_weights_are_named(shown: io.StringIO) -> None:
    for towers, said in ((10, False), (1200, True)):
        report_text.quantized(replace(QUANTIZED, unquantized={"embeddings and head": 100, "towers": towers}))
        assert ("embeddings and head 100 B, towers 1.2 kB" in shown.getvalue()) == said


def test_a_preview_names_large_unquantized_weights(shown: io.StringIO) -> None:
    preview = Preview("nf4", "bnb", [], [("a.weight", "nf4-b64, rtn", 4000)], 9000, 5300, 0.9)
    for towers, said in ((10, False), (1200, True)):
        report_text.preview(replace(preview, unquantized={"embeddings and head": 100, "towers": towers}))
        assert ("Unquantized: 1.3 kB (embeddings and head 100 B, towers 1.2 kB)." in shown.getvalue()) == said


def test_one_tensor_is_no_tensors(shown: io.StringIO) -> None:
    report_text.inspection(replace(INSPECTION, schemes={"q4_k": 1}))
    assert "q4_k in 1 tensor\n" in "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines())


def test_a_preview(shown: io.StringIO) -> None:
    tensors = [
        ("model.q.weight", "int4-g32-sym, GPTQ", 1_234_567),
        ("model.norm.weight", "unquantized (bfloat16)", 128),
    ]
    report_text.preview(Preview("gptq-4bit", "gptq", ["a note on `fit=8`"], tensors, 5_000_000, 1_234_695, 0.99))
    text = shown.getvalue()
    for words in (
        "gptq-4bit",
        "model.q.weight",
        "1,234,567",
        "unquantized",
        "note: a note on --fit 8",
        "5,000,000 bytes become 1,234,695",
    ):
        assert words in text
    assert "Nothing was written." in text


def test_an_inspection(shown: io.StringIO) -> None:
    made: dict[str, Any] = {
        "versions": {"fewbit": "9.8.7"},
        "model": "org/model",
        "plan": {"name": "gptq-4bit"},
        "calibration": {"samples": 8, "length": 256, "text": "pydoc", "seed": 3, "digest": "0123456789abcdef"},
        "tensors": [{"error": 0.001}, {"error": 0.003}],
        "notes": ["something of note"],
    }
    report_text.inspection(replace(INSPECTION, made=made))
    text = shown.getvalue()
    for words in (
        "LlamaForCausalLM",
        "int4-g64-sym in 210 tensors",
        "134,515,008, of which 78.9% are quantized",
        "fewbit 9.8.7 from org/model",
        "8 x 256 tokens of pydoc, seed 3, digest 0123456789ab",
        "2.00e-03 on average, 3.00e-03 at worst",
        "something of note",
    ):
        assert words in text


RECORD: dict[str, Any] = {
    "tensors": [{"scheme": "int4-g32-sym", "method": "GPTQ"}, {"scheme": "int4-g32-sym", "method": "GPTQ"}],
    "model": "org/model",
    "base": {"model": "org/model", "license": "mit", "pipeline_tag": "text-generation"},
    "versions": {"fewbit": "9.8.7"},
    "plan": {"name": "gptq-4bit", "format": "gptq"},
    "bits_per_weight": 4.5,
    "share": 0.9958,
    "original_bytes": 10_000,
    "output_bytes": 4_000,
    "calibration": {"samples": 8, "length": 256, "text": "pydoc", "seed": 3, "digest": "0123456789abcdef"},
}


def head_of(card: str) -> dict[str, Any]:
    """The metadata of a card, as the Hub reads them."""
    data: Any = ModelCard(card).data
    return dict(data.to_dict())


def test_a_model_card() -> None:
    card = report_card.model_card(RECORD)
    assert head_of(card) == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["fewbit", "quantized", "gptq"],
    }
    for words in (
        "# model, quantized",
        "| 2 tensors | int4-g32-sym by GPTQ |",
        "4.500",
        "99.6%",
        "10 kB before, 4 kB now",
        "8 x 256 tokens of pydoc",
        "It was not measured.",
        'AutoModelForCausalLM.from_pretrained("MODEL")',
        "With `gptqmodel` installed, transformers loads it",
        "vllm serve MODEL",
        "--calibration pydoc --samples 8 --length 256 --seed 3",
    ):
        assert words in card


def test_the_card_has_what_was_measured() -> None:
    kl = {"mean": 0.0123, "median": 0.01, "p99": 0.1, "p999": 0.2, "max": 0.3}
    measured = {"reference": "/home/somebody/model", "text": "pydoc", "tokens": 2048, "length": 512, "kl": kl}
    measured |= {"perplexity": 5.25, "reference_perplexity": 5.125, "same_top": 0.95}
    pairs = {"perplexity": [5.0, 5.5], "reference_perplexity": [5.0, 5.25], "same_top": [0.94, 0.96]}
    measured["intervals"] = pairs | {"kl": {"mean": [0.011, 0.013]}}
    for record in (
        {"evaluation": measured},
        {"converted": {"from": "m", "exact": False, "to": "gptq", "loss": measured}},
    ):
        card = report_card.model_card(RECORD | record)
        for line in (
            "Measured against model on 2,048 tokens of pydoc, in windows of 512:",
            "| KL divergence, nats per token | 0.0123 | 0.011 ... 0.013 |",
            "| same top token | 95.0% | 94.0% ... 96.0% |",
            "| perplexity | 5.25 | 5 ... 5.5 |",
            "| perplexity of the original | 5.125 | 5 ... 5.25 |",
        ):
            assert line in card.splitlines()


@pytest.mark.parametrize(
    ("format", "lines"),
    [
        ("awq", ["vllm serve org/new"]),
        ("bnb", ["vllm serve org/new"]),
        ("compressed-tensors", ["vllm serve org/new", "python -m sglang.launch_server --model-path org/new"]),
        ("gguf", ["llama-server -hf org/new --hf-file a.gguf"]),
        ("fp8", ["python -m sglang.launch_server --model-path org/new"]),
        ("dense", []),
    ],
)
def test_the_card_says_how_each_reader_loads_it(format: str, lines: list[str]) -> None:
    file = "a.gguf" if format == "gguf" else ""
    card = report_card.model_card({**RECORD, "plan": {"name": "mine", "format": format}}, "org/new", file)
    for line in lines:
        assert line in card.splitlines()
    assert ("base_model_relation" in head_of(card)) == (format != "dense")
    assert head_of(card)["library_name"] == ("gguf" if format == "gguf" else "transformers")
    more = f', gguf_file="{file}"' if file else ""
    assert f'AutoTokenizer.from_pretrained("org/new"{more})' in card


@pytest.mark.parametrize("name", ["/home/somebody/model", "./folder/model", "~/model", "model"])
def test_a_model_card_names_no_local_folder_as_base(name: str) -> None:
    card = report_card.model_card({**RECORD, "model": name, "base": {"model": None}, "calibration": None})
    assert "base_model" not in card
    assert "calibrated on" not in card
    assert "# model, quantized" in card
    assert "somebody" not in card


def test_paths_of_this_machine_are_cut() -> None:
    kept = ["org/model", "https://huggingface.co/org/model", "codes/scales", "nats / token", "a 1/2 b"]
    assert report_card.portable(kept) == kept
    told = {"from": "/home/somebody/model", "notes": ["left out: README.md of /home/somebody/m, which", "~/a/text.txt"]}
    assert report_card.portable(told) == {"from": "model", "notes": ["left out: README.md of m, which", "text.txt"]}
    told = {"from": "/home/some body/my model/", "notes": ["see file:///home/somebody/m"], "text": "file:///a b/c.txt"}
    assert report_card.portable(told) == {"from": "my model", "notes": ["see m"], "text": "c.txt"}


def test_a_listing(shown: io.StringIO) -> None:
    report_text.listing({"kernels": [Entry("reference", "Dequantizes."), Entry("other", "Faster.", "no GPU is seen")]})
    lines = {line.split()[0]: line for line in shown.getvalue().splitlines() if line.strip()}
    assert lines["reference"].rstrip().endswith("yes")
    assert lines["other"].rstrip().endswith("no: no GPU is seen")


def test_a_diagnosis(shown: io.StringIO) -> None:
    report_text.doctor(
        Hardware(
            versions={"torch": "2.13.0"},
            devices=[],
            instructions=["avx2"],
            threads=2,
            memory=8_000_000_000,
            kernels={"reference": None, "other": "no GPU is seen"},
            missing={"gguf": "reads the demo model's file"},
            advice=["Use more threads."],
        )
    )
    for words in (
        "2.13.0",
        "CPU only",
        "avx2",
        "8 GB",
        "ready",
        "no: no GPU is seen",
        "without gguf",
        "- Use more threads.",
    ):
        assert words in shown.getvalue()
