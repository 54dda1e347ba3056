"""Models that are already quantized are quantized as if they had been dequantized and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import FormatError, PlanError
from fewbit.measure import memory
from fewbit.models import decoded, stored
from fewbit.models.source import locate
from fewbit.pipeline import run
from fewbit.pipeline.capture import Inputs
from fewbit.pipeline.job import Job
from fewbit.plans import plan as plans
from tests import architectures, gguf_files, models, multimodal, packed_models
from tests.e2e.conftest import Fewbit
from tests.packed_models import LAYOUTS, edit, record, same_files

DOWN = "model.layers.0.mlp.down_proj"


def quantized(model: Path, plan: str = "nf4", **given: Any) -> tuple[Path, Any]:
    """The output of a plan beside the model, and the result."""
    out = model.with_name(f"{model.name}-{plan}")
    return out, fewbit.quantize(model, out, plan=plan, progress=False, **given)


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(models.sentences(80), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_source_gives_the_bytes_of_its_floats(layout: str, tmp_path: Path) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", layout)
    out, done = quantized(packed)
    same_files(quantized(plain)[0], out)
    kind = LAYOUTS[layout][2]
    assert done.notes[0] == (
        f"the source is already quantized ({kind}); errors are measured against its dequantized weights"
    )
    assert record(out)["source"]["kinds"] == {kind: 61440}
    assert f"already quantized ({kind}, 76.6% of its parameters)" in (out / "README.md").read_text(encoding="utf-8")
    seen = fewbit.inspect(packed)
    scheme = kind.removeprefix("compressed-tensors ").removeprefix("modelopt ")
    assert (seen.schemes, seen.quantized_parameters) == ({scheme: 14}, 61440)
    assert seen.format == LAYOUTS[layout][1]["quant_method"]


def test_weights_beside_fp8_without_a_scheme_are_decoded(tmp_path: Path) -> None:
    """compressed-tensors may have a scheme for each linear. The format reads all that it has a scheme for."""
    kinds = ("fp8-blocks", "int4-order", "int3-asym", "int8", "nvfp4", "mxfp4", "fp8")
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layouts = {leaf: f"ct-{kind}" for leaf, kind in zip(leaves, kinds, strict=True)}
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack_mixed(plain, tmp_path / "packed", layouts)
    edit(packed, {"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1)})
    out, done = quantized(packed)
    same_files(quantized(plain)[0], out)
    assert record(out)["source"]["kinds"].keys() == {LAYOUTS[layout][2] for layout in layouts.values()}
    assert "left out: 5 scales of activations or of the KV cache" in done.notes[-1]
    schemes = {LAYOUTS[layout][2].removeprefix("compressed-tensors "): 2 for layout in layouts.values()}
    assert fewbit.inspect(packed).schemes == schemes
    with pytest.raises(PlanError, match=r"reads .* as floats only"):
        fewbit.convert(packed, tmp_path / "moved", to="gptq", progress=False)
    edit(packed, {f"{DOWN}.weight_scale": None})
    with pytest.raises(FormatError, match=rf"{DOWN}.weight_scale is missing"):
        fewbit.quantize(packed, tmp_path / "again", plan="nf4", progress=False)


@pytest.mark.parametrize("layout", ["fp8-block", "ct-int4"])
def test_a_packed_source_can_be_calibrated_on(layout: str, tmp_path: Path, text: str) -> None:
    plain = models.save(tmp_path / "plain", "qwen2")
    packed = packed_models.pack(plain, tmp_path / "packed", layout)
    calibration = fewbit.Calibration(text, samples=4, length=32)
    out, _ = quantized(packed, "gptq-3bit", calibration=calibration)
    same_files(quantized(plain, "gptq-3bit", calibration=calibration)[0], out)


@pytest.mark.parametrize("plan", ["nf4", "gptq-4bit"])
def test_fused_fp4_experts_are_quantized(fewbit: Fewbit, plan: str, tmp_path: Path, text: str) -> None:
    plain = architectures.save(tmp_path / "plain", "gpt_oss")
    packed = packed_models.pack_gpt_oss(plain, tmp_path / "packed")
    for model in (plain, packed):
        out = model.with_name(f"{model.name}-out")
        flags = ["--calibration", text, "--samples", 4, "--length", 32] if plan != "nf4" else []
        answer = fewbit("quantize", model, "-o", out, "--plan", plan, *flags)
        assert answer.code == 0, answer.err
    assert "already quantized (MXFP4)" in answer.out
    same_files(tmp_path / "plain-out", tmp_path / "packed-out")


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
def test_separate_fp8_experts_are_quantized(kind: str, tmp_path: Path) -> None:
    plain = architectures.save(tmp_path / "plain", kind)
    packed = packed_models.pack(plain, tmp_path / "packed", "fp8-block")
    assert any("experts.3." in name for name in models.tensors_of(packed))
    same_files(quantized(plain)[0], quantized(packed)[0])


@pytest.mark.parametrize("source", ["gptq-4bit", "awq-4bit", "nf4", "int8"])
def test_own_formats_are_sources(source: str, tmp_path: Path, text: str) -> None:
    model = models.save(tmp_path / "model", "llama")
    given = {"calibration": fewbit.Calibration(text, samples=4, length=32)} if "-" in source else {}
    packed, _ = quantized(model, source, **given)
    plain = tmp_path / "plain"
    fewbit.load(packed).dequantize().save_pretrained(plain)
    models.tokenizer().save_pretrained(plain)
    out, done = quantized(packed, "gptq-3bit", calibration=fewbit.Calibration(text, samples=4, length=32))
    same_files(quantized(plain, "gptq-3bit", calibration=fewbit.Calibration(text, samples=4, length=32))[0], out)
    assert "the source is already quantized" in done.notes[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_gguf_file_is_a_source(family: str, tmp_path: Path, text: str) -> None:
    plain = gguf_files.save(tmp_path / "plain", family)
    file = gguf_files.written(plain, tmp_path / "model.gguf", "q8_0")
    loaded = fewbit.load(file).dequantize().state_dict()
    own = {name: loaded[name] for name in models.tensors_of(plain)}
    edit(plain, {name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in own.items()})
    models.edit_json(plain / "config.json", dtype="bfloat16")
    out, done = quantized(file, "int8")
    same_files(quantized(plain, "int8")[0], out)
    assert "already quantized (GGUF q8_0)" in done.notes[0]
    close = fewbit.evaluate(out, reference=file, text=text, length=32, samples=2)
    assert close.quality.kl is not None
    assert close.quality.kl.mean.value < 0.1
    assert fewbit.quantize(file, tmp_path / "again.gguf", plan="q4_0", progress=False).tensors


def test_what_saves_nothing_is_noted(tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "fp8-tensor")
    _, done = quantized(packed, "int8")
    assert done.notes[1].startswith("the plan takes 8.467 bits per weight with scales. The source's files take 8")
    assert "adds error and saves nothing" in done.notes[1]
    _, done = quantized(packed, "nf4")
    assert not [note for note in done.notes if "saves nothing" in note]


def test_embeddings_that_get_smaller_save_something(tmp_path: Path) -> None:
    """A GGUF file has embeddings in few bits, and most other formats have them in 16."""
    packed, _ = quantized(models.save(tmp_path / "plain", "llama"), "rtn-4bit")
    _, done = quantized(packed, "int8")
    assert [note for note in done.notes if "saves nothing" in note]
    done = fewbit.quantize(packed, tmp_path / "again.gguf", plan="q4_0", progress=False)
    assert not [note for note in done.notes if "saves nothing" in note]


@pytest.mark.parametrize(("only", "saves"), [("down_proj.weight", True), ("proj.weight", False)])
def test_linears_that_get_smaller_save_something(only: str, saves: bool, tmp_path: Path) -> None:
    """Those that the source has in 16 bits."""
    plain = models.save(tmp_path / "plain", "llama", dtype="bfloat16")
    packed = packed_models.pack(plain, tmp_path / "packed", "ct-int4", only)
    _, done = quantized(packed, "int8")
    assert bool([note for note in done.notes if "saves nothing" in note]) != saves


def test_fused_experts_count_as_quantized(tmp_path: Path) -> None:
    plain = architectures.save(tmp_path / "plain", "gpt_oss")
    packed = packed_models.pack_gpt_oss(plain, tmp_path / "packed")
    skeleton = Job.prepare(locate(packed), plans.find("nf4"), "cpu").settled.skeleton
    experts = {name for name in skeleton.all_linears() if ".experts." in name}
    assert stored.quantized_modules(skeleton) == experts
    assert experts


def test_the_same_source_again_resumes_only_if_unchanged(tmp_path: Path) -> None:
    """The fingerprint of a run covers the packed files."""
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "fp8-tensor")

    def fingerprint() -> str:
        job = Job.prepare(locate(packed), plans.find("nf4"), "cpu")
        return run.fingerprint(job.settled, Inputs(), {})

    first = fingerprint()
    assert fingerprint() == first
    scale = models.tensors_of(packed)[f"{DOWN}.weight_scale_inv"]
    edit(packed, {f"{DOWN}.weight_scale_inv": scale * 2})
    assert fingerprint() != first


BROKEN: dict[str, tuple[str, str, Tensor | None, str]] = {
    "no scale": ("fp8-block", "weight_scale_inv", None, "weight_scale_inv is missing"),
    "no weight": ("fp8-block", "weight", None, "weight is missing"),
    "shape of scales": ("fp8-block", "weight_scale_inv", torch.ones(3, 3), "[2, 3] or [64, 1] or [1, 1]"),
    "type of scales": ("fp8-block", "weight_scale_inv", torch.ones(2, 3, dtype=torch.int32), "a float"),
    "NaN": ("fp8-block", "weight_scale_inv", torch.full((2, 3), torch.nan), "weight_scale_inv has NaN or Inf"),
    "NaN exponent": ("ct-mxfp4", "weight_scale", torch.full((64, 3), 255, dtype=torch.uint8), "has NaN or Inf"),
    "negative FP8 scale": (
        "ct-fp8",
        "weight_scale",
        -torch.ones(64, 1),
        "weight_scale has numbers that are not above 0",
    ),
    "FP8 scale of 0": ("ct-fp8", "weight_scale", torch.zeros(64, 1), "weight_scale has numbers that are not above 0"),
    "global scale of 0": ("ct-nvfp4", "weight_global_scale", torch.zeros(1), "weight_global_scale has numbers that"),
    "no float": ("fp8-block", "weight", torch.ones(64, 96, dtype=torch.bfloat16), "float8_e4m3fn"),
    "no words": ("ct-int4", "weight_packed", None, "weight_packed is missing"),
    "width": ("ct-int4", "weight_packed", torch.zeros(64, 7, dtype=torch.int32), "[64, 12]"),
    "stated shape": ("ct-int4", "weight_shape", torch.tensor([64, 100]), "weight_shape is [64, 100]"),
    "no shape": ("ct-int4", "weight_shape", None, "weight_shape is missing"),
    "zero points": ("ct-int3-asym", "weight_zero_point", torch.zeros(1, 3, dtype=torch.int32), "int32 [6, 3]"),
    "no global scale": ("ct-nvfp4", "weight_global_scale", None, "weight_global_scale is missing"),
    "no second scale": ("modelopt-nvfp4", "weight_scale_2", None, "weight_scale_2 is missing"),
    "AWQ of ModelOpt": ("modelopt-nvfp4", "pre_quant_scale", torch.ones(96), "pre_quant_scale changes what"),
    "scales of integers": ("ct-int8", "weight_scale", torch.ones(5, 1), "[64, groups]"),
    "scales of a tensor": ("ct-fp8", "weight_scale", None, "weight_scale is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_names_its_tensor(case: str, fewbit: Fewbit, tmp_path: Path) -> None:
    layout, part, tensor, words = BROKEN[case]
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", layout)
    edit(packed, {f"{DOWN}.{part}": tensor})
    answer = fewbit("quantize", packed, "-o", tmp_path / "out", "--plan", "nf4", "--dry-run")
    assert answer.code == 3, answer.out
    assert DOWN in answer.err
    assert words in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["_scales", "_blocks"])
def test_broken_fp4_experts_name_their_tensor(part: str, tmp_path: Path) -> None:
    packed = packed_models.pack_gpt_oss(architectures.save(tmp_path / "plain", "gpt_oss"), tmp_path / "packed")
    name = f"model.layers.0.mlp.experts.down_proj{part}"
    stored = models.tensors_of(packed)[name]
    for wrong in (None, stored[:, :-1], stored.to(torch.int8)):
        edit(packed, {name: wrong})
        with pytest.raises(FormatError, match="down_proj"):
            fewbit.quantize(packed, tmp_path / "out", plan="nf4")


def test_settings_in_a_file_of_modelopt_are_read(tmp_path: Path) -> None:
    """Older ModelOpt folders say nothing in config.json."""
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "modelopt-fp8")
    wanted = models.tensors_of(quantized(packed)[0])
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    settings = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (packed / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}), encoding="utf-8")
    out = tmp_path / "again"
    fewbit.quantize(packed, out, plan="nf4", progress=False)
    found = models.tensors_of(out)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not (out / "hf_quant_config.json").exists()


def test_fp8_scales_without_a_config_are_named(tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "fp8-block")
    models.edit_json(packed / "config.json", quantization_config=None)
    with pytest.raises(FormatError, match="_scale_inv, but config"):
        fewbit.quantize(packed, tmp_path / "out", plan="nf4")
    with pytest.raises(FormatError, match="_scale_inv, but config"):
        fewbit.load(packed)


@pytest.mark.filterwarnings("ignore:.*is dequantized in memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_decoded_counts_as_decoded_at_rest(layout: str, tmp_path: Path) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", layout)
    found = fewbit.inspect(packed)
    if decoded.is_packed(locate(packed)):
        # A number that a file has once for a tensor is in memory once for each row.
        rows = sum(len(tensor) for name, tensor in models.tensors_of(plain).items() if "_proj" in name)
        assert found.weights_bytes < 1.01 * found.file_bytes + 4 * rows
    else:
        model = fewbit.load(packed, device="cpu")
        assert found.weights_bytes == memory.at_rest(model).parameters
        assert found.file_bytes < 0.7 * found.weights_bytes
        assert found.bits_per_weight == 8 * found.file_bytes / found.parameters


@pytest.mark.filterwarnings("ignore:.*is dequantized in memory")
@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("fp8-block", r"would load model\..*: \[40, 40\], the block of .*_scale_inv, does not divide \[64, 96\]"),
        ("fp8-autofp8", r"would load model\..*: it ignores the scales .*proj\.weight_scale\n"),
    ],
)
def test_what_transformers_would_load_wrong_is_an_error(layout: str, words: str, tmp_path: Path) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", layout)
    with pytest.raises(FormatError, match=words) as refused:
        AutoModelForCausalLM.from_pretrained(packed)
    assert "fewbit.load" in refused.value.hint
    model, wanted = fewbit.load(packed, device="cpu"), models.tensors_of(plain)
    own = (model.dequantize() if decoded.is_packed(locate(packed)) else model).state_dict()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", ["fp8-power", "fp8-tensor"])
def test_what_transformers_loads_right_is_left_to_it(layout: str, tmp_path: Path) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", layout)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    ids = torch.arange(20)[None]
    wanted = models.logits(models.original(plain), ids)
    assert (models.logits(model, ids) - wanted).norm() < 0.02 * wanted.norm()


def test_an_unknown_method_is_named(fewbit: Fewbit, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama")
    models.edit_json(model / "config.json", quantization_config={"quant_method": "seven"})
    answer = fewbit("quantize", model, "-o", tmp_path / "out")
    assert answer.code == 3
    assert "'seven'" in answer.err
    assert "compressed-tensors" in answer.err


@pytest.mark.filterwarnings("ignore:.*is dequantized in memory")  # of blocks that fewbit has no scheme for
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_model_loads_as_its_floats(layout: str, tmp_path: Path, text: str) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", layout)
    measured = fewbit.evaluate(packed, reference=plain, text=text, length=32, samples=2, device="cpu")
    assert measured.quality.kl is not None
    if decoded.is_packed(locate(packed)):  # products with packed weights round otherwise
        assert measured.quality.kl.max < 0.01
        own, wanted = fewbit.load(packed, device="cpu").dequantize().state_dict(), models.tensors_of(plain)
        assert all(torch.equal(own[name], wanted[name]) for name in wanted)
    else:
        assert measured.quality.kl.max == 0
    assert fewbit.generate(packed, "the", max_new_tokens=2, device="cpu").tokens == 2


def test_fused_fp4_experts_load_as_their_floats(tmp_path: Path, text: str) -> None:
    plain = architectures.save(tmp_path / "plain", "gpt_oss")
    packed = packed_models.pack_gpt_oss(plain, tmp_path / "packed")
    measured = fewbit.evaluate(packed, reference=plain, text=text, length=32, samples=2, device="cpu")
    assert measured.quality.kl is not None
    assert measured.quality.kl.max < 0.01  # products with packed weights round otherwise


@pytest.mark.filterwarnings("ignore:.*is dequantized in memory")
@pytest.mark.parametrize("given", [{"fuse": 32}, {"kernel": "reference"}])
def test_what_needs_packed_weights_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", "fp8-power")
    with pytest.raises(PlanError, match="has no packed weights that fewbit reads"):
        fewbit.load(packed, **given)


@pytest.mark.filterwarnings("ignore:.*is dequantized in memory")
def test_an_adapter_is_merged_into_the_floats(tmp_path: Path, text: str) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", "fp8-block")
    made, _ = quantized(packed)
    tuning = fewbit.Tuning(length=32, batch=8, epochs=1)
    fewbit.finetune(made, tmp_path / "adapter", data=text, tuning=tuning)
    for base, out in ((packed, "by-packed"), (plain, "by-plain"), (None, "by-record")):
        fewbit.merge(made, tmp_path / "adapter", tmp_path / out, base=base, text=text, length=32, samples=2)
    same_files(tmp_path / "by-plain", tmp_path / "by-packed")
    same_files(tmp_path / "by-plain", tmp_path / "by-record")
    assert "quantization_config" not in (tmp_path / "by-packed" / "config.json").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
def test_a_packed_model_with_a_vision_tower_is_a_source(tmp_path: Path) -> None:
    plain = multimodal.save(tmp_path / "plain", "gemma3")
    packed = packed_models.pack(plain, tmp_path / "packed", "fp8-block")
    same_files(quantized(plain)[0], quantized(packed)[0])
    assert type(fewbit.load(packed, device="cpu")).__name__ == "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_settings_of_another_tool_are_not_copied(file: str, tmp_path: Path) -> None:
    """AutoGPTQ's settings beside the weights would make readers take the new weights for AutoGPTQ's."""
    model = models.save(tmp_path / "model", "llama")
    packed, _ = quantized(model, "rtn-4bit")
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    (packed / file).write_text(json.dumps(config.pop("quantization_config")), encoding="utf-8")
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (packed / "model.safetensors").rename(packed / "gptq_model-4bit-32g.safetensors")
    out, done = quantized(packed)
    assert "already quantized (gptq int4" in done.notes[0]
    assert not (out / file).exists()
    assert "transformers_weights" not in json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert fewbit.inspect(out).format == "bnb"


@pytest.mark.parametrize("layout", ["ct-int4-order", "ct-nvfp4", "fp8-b128", "modelopt-nvfp4"])
def test_a_few_rows_are_decoded_alone(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_models.pack(models.save(tmp_path / "plain", "llama"), tmp_path / "packed", layout)
    checkpoint, packing = decoded.opened(locate(packed))
    assert packing is not None
    codec, counted, whole = (
        type(packing.weights[f"{DOWN}.weight"].held.codec),
        list[int](),
        checkpoint.get(f"{DOWN}.weight"),
    )
    inner = codec.dequantize

    def counting(*args: Any) -> torch.Tensor:
        counted.append(len(values := inner(*args)))
        return values

    monkeypatch.setattr(codec, "dequantize", counting)
    assert torch.equal(checkpoint.slice(f"{DOWN}.weight")[5:9], whole[5:9])
    assert counted == [4]
