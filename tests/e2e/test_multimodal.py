"""Models with vision or audio towers: the language model is quantized, everything else stays as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbit as package
from fewbit.errors import FewbitError, FormatError, PlanError
from fewbit.nn.fused import packed_linears
from fewbit.nn.layers import QLinear
from tests import architectures, models, multimodal
from tests.e2e.conftest import Fewbit

TOWER = "model.visual."
MTP = {"mtp.fc.weight": torch.rand(8, 8), "mtp.layers.0.self_attn.q_proj.weight": torch.rand(8, 8).bfloat16()}


PLANS = ("gptq-4bit", "nf4", "int8", "awq-4bit")
POPULAR = ("gemma3", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5_moe", "smolvlm", "voxtral")
# Popular types and another tenth of all each day by one plan; all types by all plans in `make test-all`.
TODAY = {(k, PLANS[n % 2]) for n, k in enumerate(sorted({*POPULAR, *architectures.today(multimodal.TYPES)}))}


def is_quick(kind: str, plan: str) -> bool:
    return (kind, plan) in TODAY


@pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
@pytest.mark.parametrize(("kind", "plan"), architectures.cases(multimodal.TYPES, PLANS, is_quick))
def test_every_type_is_served_or_says_why_not(kind: str, plan: str, tmp_path: Path) -> None:
    if kind in multimodal.NOT_BUILT:
        with pytest.raises(Exception, match=multimodal.NOT_BUILT[kind]):
            multimodal.save(tmp_path, kind)
        return
    folder = multimodal.save(tmp_path / "model", kind)
    calibration = package.Calibration([models.sentences(60)], samples=4, length=32)

    def quantize() -> None:
        package.quantize(folder, tmp_path / "out", plan=plan, calibration=calibration, device="cpu")

    if reason := multimodal.refusal(kind, plan):
        with pytest.raises(FewbitError, match=reason):
            quantize()
        return
    quantize()
    model = package.load(tmp_path / "out", dtype=torch.float32, kernel="reference")
    expected = models.original(folder)
    assert type(model) is type(expected)
    packed = packed_linears(model)
    before, after = expected.state_dict(), model.state_dict()
    towers = {name for name in before if not name.startswith(blocks_of(packed))}
    assert packed
    assert any("norm" in name or "embed" in name for name in towers)
    assert [name for name in sorted(towers) if not same(after[name], before[name])] == []
    if plan.startswith("awq"):  # it scales norms and biases too
        expected.load_state_dict(
            {n: t for n, t in after.items() if n in before and t.is_floating_point()}, strict=False
        )
    for name, module in packed.items():
        architectures.put(expected, name, module.qtensor().dequantize())
    inputs = multimodal.inputs(kind, expected)
    with torch.inference_mode():
        wanted, got = expected(**inputs).logits, model(**inputs).logits
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def blocks_of(packed: Iterable[str]) -> tuple[str, ...]:
    """The prefix of the list of blocks that these linears belong to."""
    (found,) = {re.split(r"\.\d+\.", name)[0] for name in packed}
    return (f"{found}.",)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A tiny Qwen3.5 with vision tower, layers of both kinds, MTP tensors, and a file of its processor."""
    folder = multimodal.save(tmp_path / "model", "qwen3_5")
    save_file({**models.tensors_of(folder), **MTP}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 64}}', encoding="utf-8")
    return folder


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("plan", ["gptq-4bit", "nf4"])
def test_the_command_quantizes_the_language_model_alone(
    plan: str, qwen: Path, tmp_path: Path, text: Path, fewbit: Fewbit
) -> None:
    out = tmp_path / "out"
    calibration = [] if plan == "nf4" else ["--calibration", text, "--samples", 4, "--length", 32]
    done = fewbit("quantize", qwen, "-o", out, "--plan", plan, "--device", "cpu", *calibration)
    assert done.code == 0, done.err
    assert "carried over as is: 2 tensors" in done.out + done.err
    before, after = models.tensors_of(qwen), models.tensors_of(out)
    kept = [name for name in before if name.startswith((TOWER, "mtp.")) or "norm" in name or "embed" in name]
    assert any(name.startswith(TOWER) for name in kept)
    assert all(same(after[name], before[name]) for name in kept)
    was, now = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (qwen, out))
    assert now.pop("quantization_config")
    assert now == was
    assert (out / "preprocessor_config.json").read_bytes() == (qwen / "preprocessor_config.json").read_bytes()
    model = package.load(out, dtype="float32", kernel="reference")
    assert type(model) is transformers.Qwen3_5ForConditionalGeneration
    linears = packed_linears(model)
    assert {name.split(".")[3] for name in linears} == {"0", "1"}
    expected = models.with_weights(
        models.original(qwen), {name: module.qtensor().dequantize() for name, module in linears.items()}
    )
    inputs = multimodal.inputs("qwen3_5", expected)
    with torch.inference_mode():
        wanted, got = expected(**inputs).logits, model(**inputs).logits
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    again = fewbit("generate", out, "The weight", "--max-new-tokens", 4)
    assert again.code == 0, again.err


def test_transformers_loads_it_through_the_same_class(qwen: Path, tmp_path: Path) -> None:
    package.quantize(qwen, tmp_path / "out", plan="nf4", device="cpu")
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", device_map="cpu")
    assert type(model) is transformers.Qwen3_5ForConditionalGeneration
    assert not any(isinstance(module, QLinear) for module in model.model.visual.modules())
    assert any(type(module).__name__ in ("QLinear", "Linear4bit") for module in model.model.language_model.modules())


def test_the_named_class_decides_what_is_built(qwen: Path, tmp_path: Path) -> None:
    transformers.Qwen3_5ForCausalLM.from_pretrained(qwen).save_pretrained(tmp_path / "text")
    models.tokenizer().save_pretrained(tmp_path / "text")
    package.quantize(tmp_path / "text", tmp_path / "out", plan="nf4", device="cpu")
    assert type(package.load(tmp_path / "out")) is transformers.Qwen3_5ForCausalLM
    config = json.loads((qwen / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]
    (qwen / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert type(package.load(qwen)) is transformers.Qwen3_5ForConditionalGeneration


def test_a_tower_larger_than_the_language_model_stays(tmp_path: Path) -> None:
    folder = multimodal.save(tmp_path / "model", "got_ocr2")  # its tower has more parameters
    package.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")
    before, after = models.tensors_of(folder), models.tensors_of(tmp_path / "out")
    tower = [name for name in before if "vision_tower" in name]
    assert tower
    assert all(same(after[name], before[name]) for name in tower)


def test_a_classifier_is_refused_at_once(tmp_path: Path) -> None:
    folder = multimodal.save(tmp_path / "model", "shieldgemma2")
    with pytest.raises(FewbitError, match="the weights are of ShieldGemma2ForImageClassification"):
        package.preview(folder, plan="nf4")


def test_no_text_pass_and_a_plan_that_calibrates_are_refused(tmp_path: Path) -> None:
    folder = multimodal.save(tmp_path / "model", "idefics")
    with pytest.raises(PlanError, match="IdeficsForVisionText2Text does not run on text alone") as raised:
        package.preview(folder, plan="gptq-4bit")
    assert "needs no calibration" in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("blip-2", "checked by a forward pass of language_model only, as .* each forward pass needs pixel_values"),
        ("kosmos-2", "checked by a forward pass of text_model only, as Kosmos2ForConditionalGeneration does not run"),
        ("voxtral_realtime", "checked by loading it only, as .* You must specify exactly one of input_features"),
    ],
)
def test_a_note_says_how_a_model_that_needs_more_is_checked(kind: str, note: str, tmp_path: Path) -> None:
    done = package.quantize(multimodal.save(tmp_path / "model", kind), tmp_path / "out", plan="nf4", device="cpu")
    assert any(re.search(note, each) for each in done.notes), done.notes


@pytest.mark.parametrize("kind", ["blip-2", "kosmos-2"])
def test_verbs_refuse_to_run_it_on_text(kind: str, tmp_path: Path) -> None:
    folder, text = multimodal.save(tmp_path / "model", kind), [models.sentences(30)]
    tuning = package.Tuning(steps=1, length=16, rank=2)
    for verb in (
        lambda: package.generate(folder, "the model"),
        lambda: package.evaluate(folder, text=text, length=32),
        lambda: package.finetune(folder, tmp_path / "adapter", data=text, tuning=tuning, device="cpu"),
    ):
        with pytest.raises(PlanError, match="does not run on text alone: "):
            verb()
    assert type(package.load(folder)).__name__ == multimodal.CLASSES[kind]


def test_calibration_reaches_an_inner_language_model(tmp_path: Path) -> None:
    folder = multimodal.save(tmp_path / "model", "blip-2")
    calibration = package.Calibration([models.sentences(60)], samples=4, length=32)
    whole = package.quantize(folder, tmp_path / "whole", plan="gptq-4bit", calibration=calibration, device="cpu")
    inner = tmp_path / "inner"
    models.original(folder).language_model.save_pretrained(inner)
    models.tokenizer().save_pretrained(inner)
    alone = package.quantize(inner, tmp_path / "alone", plan="gptq-4bit", calibration=calibration, device="cpu")
    assert [tensor.error for tensor in whole.tensors] == [tensor.error for tensor in alone.tensors]


@pytest.mark.parametrize(
    ("kind", "plan"), [("Bart", "gptq-4bit"), ("Bart", "awq-4bit"), ("Bart", "nf4"), ("T5", "nf4"), ("T5", "int8")]
)
def test_an_encoder_decoder_model_keeps_its_encoder(kind: str, plan: str, tmp_path: Path) -> None:
    config = architectures.small(getattr(transformers, f"{kind}Config"), architectures.SIZES, {"t5": {"d_kv": 16}})
    made = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    architectures.draw(made, 3)
    made.save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    calibration = package.Calibration([models.sentences(60)], samples=4, length=32)
    done = package.quantize(tmp_path / "model", tmp_path / "out", plan=plan, calibration=calibration, device="cpu")
    assert any("checked by a forward pass only, as the model has an encoder" in note for note in done.notes)
    model = package.load(tmp_path / "out", dtype=torch.float32, kernel="reference")
    expected, packed = models.original(tmp_path / "model"), packed_linears(model)
    assert type(model) is type(expected)
    assert packed
    assert all("decoder" in name for name in packed)
    assert not [tensor.module for tensor in done.tensors if any("no calibration input" in n for n in tensor.notes)]
    if plan.startswith("awq"):
        known = expected.state_dict()
        given = {n: t for n, t in model.state_dict().items() if n in known and t.is_floating_point()}
        expected.load_state_dict(given, strict=False)
    for name, module in packed.items():
        architectures.put(expected, name, module.qtensor().dequantize())
    ids = torch.randint(3, 200, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, got = (m(input_ids=ids, decoder_input_ids=ids[:, 3:12]).logits for m in (expected, model))
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    with pytest.raises(PlanError, match="is an encoder-decoder model, and does not continue a text"):
        package.generate(tmp_path / "out", "the model")


def test_an_encoder_decoder_classifier_is_refused(tmp_path: Path) -> None:
    config = architectures.small(transformers.BartConfig, architectures.SIZES, {})
    transformers.BartForSequenceClassification(config).save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match="BartForSequenceClassification is an encoder-decoder model that generates no"):
        package.preview(tmp_path / "model", plan="nf4")


def test_a_config_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "llama")
    models.edit_json(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(FormatError, match="describes no causal LM and no multimodal LM"):
        package.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")


@pytest.mark.parametrize("kind", sorted({"gemma3", "kimi_k25", "mistral_large4"} & {*multimodal.TYPES}))
def test_towers_keep_their_names_on_disk(kind: str, tmp_path: Path) -> None:
    folder = multimodal.save(tmp_path / "model", kind)
    package.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")
    before, after = models.tensors_of(folder), models.tensors_of(tmp_path / "out")
    towers = [name for name in before if name.startswith("vision")]
    assert towers
    assert all(same(after[name], before[name]) for name in towers)


@pytest.mark.parametrize(
    "kind", sorted({"minimax_m3_vl", "molmo2"} & {*multimodal.TYPES})
)  # gate and up: merged, split
def test_tensors_of_a_packed_weight_have_one_prefix(kind: str, tmp_path: Path) -> None:
    package.quantize(multimodal.save(tmp_path / "model", kind), tmp_path / "out", plan="int8", device="cpu")
    names = {*models.tensors_of(tmp_path / "out")}
    packed = [name.removesuffix("SCB") for name in names if name.endswith("SCB")]
    assert any("gate" in name for name in packed)
    assert {f"{name}{end}" for name in packed for end in ("weight", "weight_format")} <= names


def test_names_of_an_older_checkpoint_are_kept(tmp_path: Path) -> None:
    folder = multimodal.save(tmp_path / "model", "llava")
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in models.tensors_of(folder).items()
    }
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    package.quantize(folder, tmp_path / "out", plan="rtn-4bit", device="cpu")
    after = models.tensors_of(tmp_path / "out")
    kept = [name for name in older if not name.startswith("language_model.model.layers")]
    assert all(same(after[name], older[name]) for name in kept)
    assert "language_model.model.layers.0.mlp.up_proj.qweight" in after
    config = models.quantization_of(tmp_path / "out")
    named = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    assert f"-:^{re.escape(named)}$" in config["dynamic"]
    assert f"-:^{re.escape(named.replace('vision_tower.vision_model.', 'model.vision_tower.'))}$" in config["dynamic"]
    package.load(tmp_path / "out")


def test_gguf_holds_no_tower(qwen: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    done = fewbit("quantize", qwen, "-o", tmp_path / "out.gguf", "--plan", "q4_0")
    assert done.code == 2
    assert "Qwen3_5ForConditionalGeneration has a vision or audio tower, and a GGUF file holds" in done.err


def test_an_adapter_leaves_the_towers_alone(qwen: Path, tmp_path: Path) -> None:
    package.quantize(qwen, tmp_path / "out", plan="nf4", device="cpu")
    tuning, data = package.Tuning(steps=1, length=16, rank=2), [models.sentences(30)]
    package.finetune(tmp_path / "out", tmp_path / "adapter", data=data, tuning=tuning, device="cpu")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names
    assert all(".language_model.layers." in name for name in names)
    package.merge(qwen, tmp_path / "adapter", tmp_path / "merged")
    before, after = models.tensors_of(qwen), models.tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all(same(after[name], before[name]) for name in before if name.startswith((TOWER, "mtp.")))
    assert type(package.load(tmp_path / "merged")) is transformers.Qwen3_5ForConditionalGeneration


@pytest.mark.filterwarnings("default")  # some gates stay in 16 bits, and a warning says so
@pytest.mark.parametrize(
    ("auto", "kind"),
    [("AutoModelForImageTextToText", "ForConditionalGeneration"), ("AutoModelForCausalLM", "ForCausalLM")],
)
def test_loading_quantizes_the_class_that_is_loaded(auto: str, kind: str, qwen: Path) -> None:
    config = transformers.GPTQConfig(
        bits=4, group_size=32, dataset=[models.sentences(60)], tokenizer=models.tokenizer()
    )
    model = getattr(transformers, auto).from_pretrained(qwen, quantization_config=config, device_map="cpu")
    assert type(model).__name__ == f"Qwen3_5{kind}"
    packed = [name for name, module in model.named_modules() if isinstance(module, QLinear)]
    assert packed
    assert all(".layers." in name for name in packed)
