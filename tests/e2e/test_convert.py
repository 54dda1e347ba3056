"""`fewbit convert`: exact conversions in both directions, and refusals before any work."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import fewbit as package
from fewbit.api.convert import preview
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models import scales
from fewbit.models.decoded import opened
from fewbit.models.source import locate
from fewbit.pipeline import write_folder, write_gguf
from fewbit.plans.plan import Plan, Rule
from tests import architectures, gguf_files, models, packed_models
from tests.e2e.conftest import Fewbit
from tests.packed_models import record

SHAPE: dict[str, Any] = {"intermediate_size": 128, "attention_bias": True}
CHAT = models.CHAT
CT = "compressed-tensors"


def plan(scheme: str, format: str) -> Plan:
    return Plan(f"{scheme} in {format}", format, (Rule("*", scheme, "rtn"),))


def quantized(model: Path, out: Path, scheme: str, format: str = "gptq") -> Path:
    package.quantize(model, out, plan=plan(scheme, format), progress=False)
    return out


def converted(model: Path, out: Path, to: str, **given: Any) -> Any:
    return package.convert(model, out, to=to, progress=False, **given)


def values(model: Path) -> dict[str, Tensor]:
    """The values of the quantized weights, in float64, by their names in the checkpoint."""
    source = locate(model)
    _, packing = opened(source, AutoConfig.from_pretrained(source.folder, **source.options))
    assert packing is not None
    found = {name: weight.read() for name, weight in packing.weights.items()}
    return {name: w.dequantize(torch.float64) for name, w in found.items()}


def same_values(one: Path, other: Path) -> None:
    a, b = values(one), values(other)
    assert a.keys() == b.keys()
    assert a
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, biases, a chat template, a generation config."""
    folder = models.save(tmp_path_factory.mktemp("convert") / "model", "llama", chat=CHAT, **SHAPE)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}', encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("scheme", "format", "to", "back"),
    [
        ("int4-g32-sym", "gptq", "awq", "gptq"),
        ("int4-g32", "gptq", "awq", "gptq"),
        ("int4-g32", "awq", "gptq", "awq"),
        ("int4-row-sym", "gptq", "awq", "gptq"),
        ("int4-g32-sym", "gptq", "gptq-v2", "gptq-v1"),
        ("int3-g32", "gptq", "gptq-v1", "gptq-v2"),
        ("int4-g32-sym", "gptq", "gguf", "gptq"),
        ("int8-g32-sym", "gptq", "gguf", "gptq"),
        ("int4-g32-sym", "awq", "gguf", "awq"),
        ("int4-g32-sym", "gptq", CT, "gptq"),
        ("int3-g32", "gptq", CT, "gptq"),
        ("int8-row-sym", "gptq", CT, "gptq"),
        ("int4-g32", "awq", CT, "awq"),
        ("int4-g32-bf16", CT, "gptq", CT),
        ("fp8-b128", "fp8", CT, "fp8"),
        ("fp8-tensor", "fp8", CT, "fp8"),
        ("int5-g32-sym-bf16", CT, "gguf", CT),
    ],
)
def test_there_and_back_gives_the_bytes(
    scheme: str, format: str, to: str, back: str, model: Path, tmp_path: Path
) -> None:
    first = quantized(model, tmp_path / "first", scheme, format)
    second = tmp_path / ("second.gguf" if to == "gguf" else "second")
    done = converted(first, second, to)
    assert done.exact
    assert sum(done.schemes.values()) == 14
    assert not done.decoded
    same_values(first, second)
    converted(second, tmp_path / "third", back)
    same_values(first, tmp_path / "third")
    if to != "gguf":
        packed_models.same_files(first, tmp_path / "third")
        assert json.loads((tmp_path / "third" / "config.json").read_text(encoding="utf-8")) == json.loads(
            (first / "config.json").read_text(encoding="utf-8")
        )
    else:  # llama.cpp requires float32 vectors, and a folder keeps them
        a, b = models.tensors_of(first), models.tensors_of(tmp_path / "third")
        assert not [name for name in a if not torch.equal(a[name].double(), b[name].double())]
        assert not [name for name in a if a[name].dim() > 1 and a[name].dtype != b[name].dtype]


@pytest.mark.parametrize(
    ("scheme", "format", "kind"),
    [
        ("int4-g64-sym", "gptq", "q4_0"),
        ("int4-row-sym", "gptq", "q4_0"),
        ("int4-g64", "awq", "q5_0"),
        ("int5-g64-sym-bf16", CT, "q5_0"),
        ("int3-g64", "gptq", "q4_0"),
        ("int8-g64-sym", "gptq", "q8_0"),
    ],
)
def test_blocks_repeat_the_scale_of_a_group(scheme: str, format: str, kind: str, model: Path, tmp_path: Path) -> None:
    first, second = quantized(model, tmp_path / "first", scheme, format), tmp_path / "second.gguf"
    done = converted(first, second, "gguf")
    assert done.exact
    assert done.schemes == {kind: 14}
    same_values(first, second)
    ids = torch.randint(3, models.VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    wanted, found = (
        models.logits(package.load(path, dtype="float32", kernel="reference"), ids) for path in (first, second)
    )
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_package_gguf_reads_the_values(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = models.save(tmp_path / "model", "qwen3", intermediate_size=128)  # whose rows are in the model's order
    first = quantized(model, tmp_path / "first", "int4-g32-sym", "awq")
    converted(first, tmp_path / "second.gguf", "gguf")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "second.gguf").tensors}
    wanted = values(first)
    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("attn_k", "self_attn.k_proj")):
        tensor = found[f"blk.1.{theirs}.weight"]
        assert tensor.tensor_type.name == "Q4_0"
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.from_numpy(read).double(), wanted[f"model.layers.1.{ours}.weight"])


def test_tokenizer_template_and_settings_survive(model: Path, tmp_path: Path) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    converted(first, tmp_path / "second", "awq")
    converted(first, tmp_path / "third.gguf", "gguf")
    converted(tmp_path / "third.gguf", tmp_path / "fourth", "gptq")
    for out in ("second", "fourth"):
        made = AutoTokenizer.from_pretrained(tmp_path / out)
        assert made.chat_template == CHAT
        assert made("the model")["input_ids"] == AutoTokenizer.from_pretrained(model)("the model")["input_ids"]
    assert (tmp_path / "second" / "generation_config.json").read_text(encoding="utf-8") == (
        model / "generation_config.json"
    ).read_text(encoding="utf-8")
    assert (tmp_path / "second" / "LICENSE").exists()
    ids = torch.randint(3, models.VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    wanted = models.logits(package.load(first, dtype="float32", kernel="reference"), ids)
    for out in ("second", "third.gguf", "fourth"):
        found = models.logits(package.load(tmp_path / out, dtype="float32", kernel="reference"), ids)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), out


def test_the_record_says_where_the_model_comes_from(model: Path, tmp_path: Path) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    converted(first, tmp_path / "second", "awq")
    made, before = record(tmp_path / "second"), record(first)
    assert made["plan"] == before["plan"]
    assert made["origin"] == before["origin"]
    assert made["converted"]["from"] == str(first)
    assert made["converted"]["settings"]["checkpoint_format"] == "gptq"
    assert made["converted"]["schemes"] == {"int4-g32-sym": 14}
    assert "codes and scales unchanged" in (tmp_path / "second" / "README.md").read_text(encoding="utf-8")
    assert package.inspect(tmp_path / "second").made["converted"]["exact"] is True
    converted(first, tmp_path / "third.gguf", "gguf")
    assert package.inspect(tmp_path / "third.gguf").made["converted"]["to"] == "gguf"


@pytest.mark.parametrize("scheme", ["q4_0", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_gguf_file_becomes_a_folder(family: str, scheme: str, tmp_path: Path) -> None:
    model = gguf_files.save(tmp_path / "model", family)
    first = quantized(model, tmp_path / "first.gguf", scheme, "gguf")
    done = converted(first, tmp_path / "second", "gptq")
    assert [name for name in done.decoded if "embed" in name or "wte" in name]
    assert "decoded and rounded to" in done.notes[0]
    a, b = values(first), values(tmp_path / "second")
    assert b.keys() == {name for name in a if name.removesuffix(".weight") not in done.decoded}
    assert all(torch.equal(a[name], b[name]) for name in b)
    converted(tmp_path / "second", tmp_path / "third.gguf", "gguf")
    one, two = GgufFile(first), GgufFile(tmp_path / "third.gguf")
    same = [name for name, entry in one.entries.items() if entry.type == scheme and "blk" in name]
    assert same
    assert all(torch.equal(one.get(name), two.get(name)) for name in same)


SOURCES = [
    ("int4-g32-sym", CT),
    ("nvfp4", CT),
    ("mxfp4", CT),
    ("fp8-b128", CT),
    ("int4-g32-sym", "gptq"),
    ("int4-g32", "awq"),
    ("nf4-b64-dq", "bnb"),
    ("llm.int8", "bnb"),
    ("q4_k", "gguf"),
]


@pytest.mark.parametrize(("scheme", "format"), SOURCES)
def test_dense_is_what_plain_transformers_loads(scheme: str, format: str, tmp_path: Path) -> None:
    wide: dict[str, Any] = (
        {"hidden_size": 256, "intermediate_size": 256} if format == "gguf" else {"intermediate_size": 128}
    )
    model = models.save(tmp_path / "model", "llama", **wide)
    first = quantized(model, tmp_path / ("first.gguf" if format == "gguf" else "first"), scheme, format)
    done = converted(first, tmp_path / "dense", "dense")
    assert not done.exact
    assert done.notes[0].startswith("all quantized weights")
    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    weights = models.tensors_of(tmp_path / "dense")
    for name, value in values(first).items():
        assert weights[name].dtype == torch.bfloat16
        assert torch.equal(weights[name], value.float().bfloat16()), name
    assert models.original(tmp_path / "dense").config.tie_word_embeddings


@pytest.mark.parametrize("layout", ["fp8-block", "nvfp4"])
def test_layouts_of_other_makers_become_dense(layout: str, tmp_path: Path) -> None:
    found = next(name for name in packed_models.LAYOUTS if layout in name)
    plain = models.save(tmp_path / "plain", "llama")
    packed = packed_models.pack(plain, tmp_path / "packed", found)
    converted(packed, tmp_path / "dense", "dense")
    packed_models.same_files(plain, tmp_path / "dense")


def test_a_packed_gpt2_has_the_layout_of_its_model(tmp_path: Path) -> None:
    """Its linears store [K, N], and packed weights are [N, K]; one of them is square."""
    model = models.save(tmp_path / "model", "gpt2")
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    converted(first, tmp_path / "dense", "dense")
    weights, wanted = models.tensors_of(tmp_path / "dense"), values(first)
    assert {f"transformer.h.0.attn.{name}.weight" for name in ("c_attn", "c_proj")} <= wanted.keys()
    assert all(torch.equal(weights[name].T.double(), value) for name, value in wanted.items())
    package.quantize(first, tmp_path / "again", plan=plan("int4-g32-sym", "gptq"), progress=False)


def test_folded_scales_survive(text: Path, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", intermediate_size=128)
    calibration = package.Calibration(str(text), samples=4, length=32)
    folded = Plan("folded", "gguf", (Rule("*", "q4_0", "awq"),))
    package.quantize(model, tmp_path / "first.gguf", plan=folded, calibration=calibration, progress=False)
    converted(tmp_path / "first.gguf", tmp_path / "second", "gptq")
    converted(tmp_path / "second", tmp_path / "third.gguf", "gguf")
    kept = scales.read(tmp_path / "second")
    assert kept
    for file in ("first.gguf", "third.gguf"):
        assert scales.of_metadata(GgufFile(tmp_path / file).metadata).digest == kept.digest
    assert record(tmp_path / "second")["scales"]["digest"] == kept.digest


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_survive(kind: str, tmp_path: Path) -> None:
    model = architectures.save(tmp_path / "model", kind)
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    converted(first, tmp_path / "second", "awq")
    same_values(first, tmp_path / "second")
    converted(tmp_path / "second", tmp_path / "third", "gptq")
    packed_models.same_files(first, tmp_path / "third")
    converted(first, tmp_path / "dense", "dense")
    assert set(models.tensors_of(tmp_path / "dense")) == set(models.tensors_of(model))
    ids = torch.randint(3, models.VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    wanted = models.logits(package.load(first, dtype="float32", kernel="reference"), ids)
    found = models.logits(package.load(tmp_path / "second", dtype="float32", kernel="reference"), ids)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_said_of_activations_is_kept_or_named(model: Path, tmp_path: Path) -> None:
    """A plan may declare that servers round activations. GPTQ files cannot say so, and fp8 files always do."""
    eight = Plan("w8a8", CT, (Rule("*", "int8-row-sym", "rtn"),), activations="dynamic")
    package.quantize(model, tmp_path / "first", plan=eight, progress=False)
    done = converted(tmp_path / "first", tmp_path / "second", "gptq")
    assert "the source declares that servers round activations too, and the output does not" in done.notes
    plain = quantized(model, tmp_path / "plain", "fp8-b128", CT)
    done = converted(plain, tmp_path / "third", "fp8")
    assert "a fp8 file declares that servers round activations too, and the source does not" in done.notes
    back = converted(tmp_path / "third", tmp_path / "fourth", CT)
    assert not [note for note in back.notes if "activations" in note]
    config = models.quantization_of(tmp_path / "fourth")
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    same_values(plain, tmp_path / "fourth")


def test_scales_of_activations_are_named(model: Path, tmp_path: Path) -> None:
    plain = quantized(model, tmp_path / "plain", "fp8-b128", "fp8")
    first = edited(plain, tmp_path / "first", {f"{DOWN}.activation_scale": torch.ones(1)})
    done = converted(first, tmp_path / "second", CT)
    assert f"left out: 1 scales of activations or of the KV cache, such as {DOWN}.activation_scale" in done.notes


@pytest.mark.parametrize("packing", ["awq", "mxfp4"])
def test_dense_experts_are_fused_where_transformers_needs_it(packing: str, tmp_path: Path) -> None:
    """transformers has no way to load gpt-oss with tensors of single experts."""
    model = architectures.save(tmp_path / "model", "gpt_oss")
    if packing == "mxfp4":
        first = packed_models.pack_gpt_oss(model, tmp_path / "first")  # `model` has its values now
    else:
        first = quantized(model, tmp_path / "first", "int4-g32", packing)
    converted(first, tmp_path / "dense", "dense")
    a, b = models.tensors_of(model), models.tensors_of(tmp_path / "dense")
    assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in b.items()}
    ids = torch.randint(3, models.VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    source = models.original(model) if packing == "mxfp4" else package.load(first, dtype="float32", kernel="reference")
    assert torch.allclose(
        models.logits(models.original(tmp_path / "dense"), ids), models.logits(source, ids), atol=1e-4
    )


def test_a_file_without_quantized_weights_is_refused(model: Path, tmp_path: Path) -> None:
    assert converted(model, tmp_path / "first.gguf", "gguf").exact
    assert converted(tmp_path / "first.gguf", tmp_path / "second", "dense").exact
    a, b = models.tensors_of(model), models.tensors_of(tmp_path / "second")
    assert all(torch.equal(a[name].double(), b[name].double()) for name in a)
    with pytest.raises(PlanError, match="has no quantized weights"):
        converted(tmp_path / "first.gguf", tmp_path / "out", "gptq")


def edited(folder: Path, out: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A copy of a folder with other tensors and settings of its quantization config."""
    shutil.copytree(folder, out)
    save_file({**models.tensors_of(folder), **tensors}, out / "model.safetensors", metadata={"format": "pt"})
    known = models.quantization_of(out)
    models.edit_json(out / "config.json", quantization_config={**known, **config})
    return out


DOWN = "model.layers.0.mlp.down_proj"


def test_act_order_stays_in_gptq_and_is_refused_elsewhere(model: Path, tmp_path: Path) -> None:
    plain = quantized(model, tmp_path / "plain", "int4-g32-sym")
    order = torch.arange(128, dtype=torch.int32).flip(0) // 32
    first = edited(plain, tmp_path / "first", {f"{DOWN}.g_idx": order}, desc_act=True, damp_percent=0.05)
    converted(first, tmp_path / "second", "gptq-v2")
    config = models.quantization_of(tmp_path / "second")
    assert (config["desc_act"], config["static_groups"], config["damp_percent"]) == (True, False, 0.05)
    same_values(first, tmp_path / "second")
    converted(tmp_path / "second", tmp_path / "third", "gptq-v1")
    packed_models.same_files(first, tmp_path / "third")
    with pytest.raises(PlanError, match=rf"1 of 14 weights.*\n.*{DOWN}: it has act-order \(g_idx\)"):
        converted(first, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_zero_points_decide_and_not_the_config(model: Path, tmp_path: Path) -> None:
    """One weight is asymmetric though the config says `sym`, so all become asymmetric; GGUF needs a bit more for it."""
    plain = quantized(model, tmp_path / "plain", "int4-g32-sym")
    other = torch.full_like(models.tensors_of(plain)[f"{DOWN}.qzeros"], 0x55555555)
    first = edited(plain, tmp_path / "first", {f"{DOWN}.qzeros": other})
    done = converted(first, tmp_path / "second", "awq")
    assert done.schemes == {"int4-g32": 14}
    same_values(first, tmp_path / "second")
    assert converted(first, tmp_path / "out.gguf", "gguf").schemes == {"q4_0": 13, "q5_0": 1}
    same_values(first, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("scheme", "format", "to", "reason"),
    [
        ("int4-g16-sym", "gptq", "gguf", "its groups have 16 columns, and a block of q4_0 has 32"),
        ("int8-g32", "gptq", "gguf", "its levels reach from -"),
        ("int3-g32", "gptq", "awq", "awq files store 4-bit integers with scales, not int3-g32"),
        ("nf4-b64", "bnb", "gptq", "its levels are not evenly spaced"),
        ("llm.int8", "bnb", "gptq", "its scales are float32 numbers over 127"),
        ("q4_1", "gguf", "awq", "not every minimum is a whole multiple of its scale"),
        ("nvfp4", CT, "gptq", "gptq files store integers with scales, not nvfp4"),
        ("q5_0", "gguf", "gptq", "there is no common layout for 5 bits"),
        ("q8_0", "gguf", "awq", "awq files store 4-bit integers with scales, not int8-g32-sym"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(
    scheme: str, format: str, to: str, reason: str, fewbit: Fewbit, model: Path, tmp_path: Path
) -> None:
    first = quantized(model, tmp_path / ("first.gguf" if format == "gguf" else "first"), scheme, format)
    before = sorted(tmp_path.iterdir())
    answer = fewbit("convert", first, "-o", tmp_path / ("out.gguf" if to == "gguf" else "out"), "--to", to)
    assert answer.code == 2, answer.err
    assert reason in answer.err
    assert "--requantize" in answer.err
    assert sorted(tmp_path.iterdir()) == before


def test_mixed_block_types_are_refused_by_name(tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256)
    rules = (Rule("*down_proj", "q4_k", "rtn"), Rule("*", "q4_0", "rtn"))
    package.quantize(model, tmp_path / "first.gguf", plan=Plan("mixed", "gguf", rules), progress=False)
    with pytest.raises(PlanError, match=r"2 of 14 .*\n.*mlp.down_proj and 1 more: it is q4_k; .*products"):
        converted(tmp_path / "first.gguf", tmp_path / "out", "gptq")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--to", "gptq"), "already stored as gptq v1"),
        (("--to", "exl2"), "unknown format 'exl2'"),
        (("--to", "awq", "--plan", "nf4"), "--plan has no effect without --requantize"),
        (("--to", "awq", "--samples", "4"), "--samples has no effect without --requantize"),
        (("--to", "bnb", "--requantize"), "--requantize without a plan"),
        (("--to", "bnb", "--requantize", "--plan", "awq-4bit"), "plan awq-4bit makes awq"),
        (("--to", "gguf"), "Give an -o that ends in .gguf"),
    ],
)
def test_a_wrong_request_is_refused(
    flags: tuple[str, ...], words: str, fewbit: Fewbit, model: Path, tmp_path: Path
) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    answer = fewbit("convert", first, "-o", tmp_path / "out", *flags)
    assert answer.code == 2, answer.err
    assert words in answer.err
    assert not (tmp_path / "out").exists()


def test_places_are_checked_before_any_work(fewbit: Fewbit, model: Path, tmp_path: Path) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    assert "is not quantized" in fewbit("convert", model, "-o", tmp_path / "out", "--to", "awq").err
    same = fewbit("convert", first, "-o", first, "--to", "awq", "--overwrite")
    assert (same.code, "which would be lost" in same.err) == (2, True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    taken = fewbit("convert", first, "-o", tmp_path / "taken", "--to", "awq")
    assert (taken.code, "exists" in taken.err) == (2, True)


def test_too_little_disk_is_an_error_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(PlanError, match="of disk are needed"):
        converted(first, tmp_path / "out", "awq")


@pytest.mark.parametrize("to", ["awq", "gguf"])
def test_an_interruption_leaves_nothing(to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    module = write_gguf if to == "gguf" else write_folder
    write = module.write

    def interrupted(*arguments: Any) -> int:
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(first, tmp_path / ("out.gguf" if to == "gguf" else "out"), to)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


KILLED = """
import os, signal, sys
from fewbit.api import convert
from fewbit.pipeline import write_folder
write = write_folder.write
def write_and_die(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
write_folder.write = write_and_die
convert.convert(sys.argv[1], sys.argv[2], to="awq", progress=False)
"""


def test_a_killed_conversion_leaves_no_output(model: Path, tmp_path: Path) -> None:
    """What it leaves is hidden, and the next conversion to the same place removes it."""
    first, out = quantized(model, tmp_path / "first", "int4-g32-sym"), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(first), str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["first"]
    converted(first, out, "awq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out"]


def test_a_damaged_source_is_a_format_error(model: Path, tmp_path: Path) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    scales = models.tensors_of(first)[f"{DOWN}.scales"]
    scales[0, 0] = float("nan")
    broken = edited(first, tmp_path / "broken", {f"{DOWN}.scales": scales})
    with pytest.raises(FormatError, match=rf"{DOWN}.scales has NaN"):
        converted(broken, tmp_path / "out", "awq")
    wide = models.tensors_of(first)[f"{DOWN}.scales"].float() * 1.00001
    broken = edited(first, tmp_path / "wide", {f"{DOWN}.scales": wide})
    with pytest.raises(FormatError, match=rf"{DOWN}.scales is float32, and float16 cannot hold all of its values"):
        converted(broken, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_has_exact_bytes(fewbit: Fewbit, model: Path, tmp_path: Path) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    shown = fewbit("convert", first, "--to", "awq", "--dry-run", "--json").json
    assert shown["format"] == "awq"
    assert ["model.layers.0.mlp.down_proj.weight", "int4-g32-sym"] in [row[:2] for row in shown["tensors"]]
    assert "Nothing was written" in fewbit("convert", first, "--to", "awq", "--dry-run").out
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert converted(first, tmp_path / "out", "awq").output_bytes == shown["output_bytes"]
    assert preview(first, to="dense").output_bytes == converted(first, tmp_path / "dense", "dense").output_bytes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--plan", "nf4"), "--plan has no effect without --requantize"),
        (("--imatrix", __file__), "--imatrix has no effect without --requantize"),
        (("--text", "tiny"), "--text has no effect without --requantize"),
        (("--length", "32"), "--length has no effect without --requantize"),
        (("--samples", "4"), "--samples has no effect without --requantize"),
        (("--samples", "all"), "--samples has no effect without --requantize"),
        (("--calibration-samples", "4"), "--calibration has no effect without --requantize"),
        (("--set", "general.name=x"), "--set changes keys in a copy of a GGUF file"),
        (("--base", "tiny"), "--base without an adapter"),
    ],
)
def test_a_dry_run_refuses_what_the_conversion_does(
    flags: tuple[str, ...], words: str, fewbit: Fewbit, model: Path, tmp_path: Path
) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    for place in (("-o", tmp_path / "out"), ("--dry-run",)):
        answer = fewbit("convert", first, "--to", "awq", *place, *flags)
        assert answer.code == 2, answer.err
        assert words in answer.err


@pytest.mark.parametrize(("to", "scheme"), [("bnb", "nf4-b64"), ("gguf", "q8_0")])
def test_requantizing_measures_the_loss_against_the_input(
    to: str, scheme: str, fewbit: Fewbit, model: Path, text: Path, tmp_path: Path
) -> None:
    first = quantized(model, tmp_path / "first", "int4-g32-sym")
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan(scheme, to).to_json()), encoding="utf-8")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    flags = ("--requantize", "--plan", file, "--text", text, "--length", 32, "--samples", 2)
    answer = fewbit("convert", first, "-o", out, "--to", to, *flags)
    assert answer.code == 0, answer.err
    assert "The loss below is measured against the input" in answer.out
    assert str(out) in answer.out.partition("The loss below")[2]
    assert f".{out.name}" not in answer.out  # the hidden folder that it is measured in
    loss = package.inspect(out).made["converted"]["loss"]
    measured = package.evaluate(out, reference=first, text=str(text), length=32, samples=2, progress=False).quality
    assert measured.kl is not None
    assert loss["kl"]["mean"] == pytest.approx(measured.kl.mean.value, rel=1e-4)
    assert loss["kl"]["mean"] > 0
    assert loss["reference"] == str(first)
    if to != "gguf":
        card = (out / "README.md").read_text(encoding="utf-8")
        assert f"| KL divergence, nats per token | {loss['kl']['mean']:.3g} | " in card
        assert f"Measured against {first.name} on {loss['tokens']} tokens of {text.name}, in windows of 32:" in card
