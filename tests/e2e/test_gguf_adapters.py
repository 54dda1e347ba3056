"""Adapters and GGUF: a LoRA merged into a file, and a LoRA as a file, which llama.cpp adds to that of its model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import fewbit as package
from fewbit.api import quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.methods.base import Method
from fewbit.models import experts, scales
from fewbit.models import merge as merging
from fewbit.models.adapters import as_gguf
from fewbit.models.adapters.attach import attach, quiet
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.gguf.names import routes
from fewbit.models.scales import GGUF_RECORD
from fewbit.names import ADAPTER_WEIGHTS
from fewbit.schemes.base import parse
from tests import gguf_files, models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_bad_input import check

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 288, "dtype": "float32"}
IDS = torch.arange(40, dtype=torch.int64)[None] % 250


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("gguf-adapters") / "model", "llama", **SHAPE)


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    out = model.parent / "packed.gguf"
    quantize.quantize(model, out, plan="q5_k_m", calibration=[models.sentences(40)])
    return out


@pytest.fixture(scope="module")
def adapter(packed: Path, text: Path) -> Path:
    """Trained on the packed weights of the file."""
    out = packed.parent / "adapter"
    tuning = Tuning(length=32, batch=8, learning_rate=0.01, steps=8, rank=4)
    done = package.finetune(packed, out, data=str(text), tuning=tuning)
    assert done.held_out_before is not None
    assert done.held_out_after is not None
    assert done.held_out_after < 0.9 * done.held_out_before
    return out


# --- merged into a file ---


def tensors(path: Path) -> dict[str, Any]:
    file = GgufFile(path)
    return {name: np.asarray(file.get(name)) for name in file.entries}


def test_a_merge_makes_the_file_of_the_merged_folder(
    model: Path, packed: Path, adapter: Path, text: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    out, measured = tmp_path / "out.gguf", ("--text", text, "--length", 32, "--json")
    calibrated = ("--plan", "q4_k_m", "--calibration", text)
    answer = fewbit("merge", packed, adapter, "-o", out, *calibrated, "--base", model, *measured)
    assert answer.code == 0, answer.err
    assert 0 < answer.json["evaluation"]["kl"]["mean"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert fewbit("merge", packed, adapter, "-o", tmp_path / "16", "--base", model, *measured).code == 0
    assert fewbit("quantize", tmp_path / "16", "-o", tmp_path / "wanted.gguf", *calibrated).code == 0
    found, wanted = tensors(out), tensors(tmp_path / "wanted.gguf")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert answer.json["nbytes"] == GgufFile(out).nbytes
    keys = GgufFile(out).metadata
    assert keys["general.name"] == "model with adapter"
    record = json.loads(keys[GGUF_RECORD])
    assert (record["model"], record["origin"]) == (f"{model} with {adapter}", None)
    assert "/merged/" not in keys[GGUF_RECORD]
    assert {entry.type for entry in GgufFile(out).entries.values()} >= {"q4_k", "q6_k"}


def test_an_adapter_of_a_file_is_merged_into_its_values(packed: Path, adapter: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(packed.read_bytes().replace(b'"origin": "', b'"0rigin": "'))
    done = package.merge(alone, adapter, tmp_path / "out.gguf", plan="q8_0", text=[models.sentences(60)], length=32)
    assert done.base is None
    assert done.evaluation.quality.kl is not None
    assert done.evaluation.quality.kl.mean.value < 0.01
    exact: dict[str, Any] = {"dtype": "float32", "kernel": "reference"}
    merged = models.logits(package.load(tmp_path / "out.gguf", **exact), IDS)
    both = models.logits(package.load(alone, adapter=adapter, **exact), IDS)
    before = models.logits(package.load(alone, **exact), IDS)
    assert (merged - both).norm() < 0.2 * (before - both).norm()  # q8_0 rounds the sum


def test_what_cannot_be_merged_into_a_file(
    model: Path, packed: Path, adapter: Path, tmp_path: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(merging, "write_merged", work)
    place = tmp_path / "out.gguf"
    check(fewbit("merge", packed, adapter, "-o", place), 2, "without a plan merge makes a folder", "--plan q4_k_m")
    check(fewbit("merge", packed, adapter, "-o", tmp_path / "out", "--plan", "q4_k_m"), 2, "ends in .gguf")
    place.write_text("mine", encoding="utf-8")
    check(fewbit("merge", packed, adapter, "-o", place, "--plan", "q4_k_m"), 2, "exists")
    opt = models.save(tmp_path / "opt", "opt")
    with pytest.raises(PlanError, match=r"no GGUF file can be made of a model of type 'opt'"):
        package.merge(opt, adapter, tmp_path / "opt.gguf", plan="q4_k_m", text=[models.sentences(60)], length=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opt", "out.gguf"]


# --- as a file ---


def unpacked(folder: Path) -> Any:
    """The model of a folder, with linears for each expert."""
    model = models.original(folder)
    experts.separate(model)
    return model


def drawn(folder: Path, out: Path, **settings: Any) -> Path:
    """An adapter of random numbers for the model of a folder."""
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, **settings}
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`|Setting `save_embedding_layers`")
        model: Any = get_peft_model(unpacked(folder), LoraConfig(**settings))
        numbers = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=numbers)
        model.save_pretrained(out)
    return out


OTHER_RANKS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 20}}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"use_rslora": True, **OTHER_RANKS}),
    ("gpt2", {}),  # Conv1D
    ("gpt_neox", {}),  # q, k and v of a head after those of another
    ("mixtral", {"target_modules": r".*experts\.[02]\.w\d", "rank_pattern": {r"experts\.2\.w2": 3}}),
    ("qwen3_next", {"target_modules": r".*in_proj_qkvz"}),  # in pieces
    ("qwen3_5_text", {"target_modules": r".*linear_attn\.(out_proj|in_proj_\w+)"}),  # columns and rows of heads
    ("phi", {"target_modules": r".*(embed_tokens|lm_head)"}),
    (
        "sarvam_moe",
        {"target_modules": r".*(v|q)_proj", "rank_pattern": {"v_proj": 2}},
    ),  # parts of one matrix of the file
]


@pytest.mark.parametrize(("family", "settings"), KINDS)
def test_a_file_has_what_peft_adds_to_each_weight(
    family: str, settings: dict[str, Any], tmp_path: Path, fewbit: Fewbit
) -> None:
    folder, out = gguf_files.save(tmp_path / "m", family), tmp_path / "lora.gguf"
    adapter = drawn(folder, tmp_path / "adapter", **settings)
    answer = fewbit("convert", adapter, "-o", out, "--to", "gguf", "--base", folder, "--json")
    assert answer.code == 0, answer.err
    file, added = GgufFile(out), attach(unpacked(folder), adapter)
    assert answer.json["output_bytes"] == file.nbytes
    known, compared = routes(added.config), 0
    for name, layer in added.base_model.model.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        route = known[f"{name}.weight"]
        wanted = route.to_file(layer.get_delta_weight("default"))
        for piece, part in zip(route.names, [wanted] if route.split is None else route.split.cut(wanted), strict=True):
            a, b = (file.get(f"{piece}.lora_{which}") for which in "ab")
            rank = b.shape[-1]
            a = a if route.heights else route.part_of(a)
            b = route.part_of(b)
            found = a @ b.T if piece == "token_embd.weight" else b @ a
            torch.testing.assert_close(found * file.metadata["adapter.lora.alpha"] / rank, part)
            compared += 1
    assert compared >= 4 if family != "phi" else compared == 2
    ids = IDS[:, :12]
    torch.testing.assert_close(models.logits(attach(unpacked(folder), out), ids), models.logits(added, ids))
    assert not torch.allclose(models.logits(unpacked(folder), ids), models.logits(added, ids), atol=1e-2)


def test_a_file_is_an_adapter_wherever_a_folder_is(
    model: Path, packed: Path, adapter: Path, text: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    out, exact = tmp_path / "lora.gguf", {"dtype": "float32", "kernel": "reference"}
    assert fewbit("convert", adapter, "-o", out, "--to", "gguf").code == 0  # its base is what it names
    for base in (packed, model):
        options: dict[str, Any] = exact if base == packed else {}
        both = [models.logits(package.load(base, adapter=each, **options), IDS) for each in (out, adapter)]
        assert torch.equal(*both)
    prompt = ("the", "--max-new-tokens", 8, "--adapter")
    said = [fewbit("generate", packed, *prompt, each) for each in (out, adapter)]
    assert said[0].code == 0, said[0].err
    assert said[0].out == said[1].out
    measured = ("--text", text, "--length", 32, "--samples", 2, "--json")
    beside = fewbit(
        "evaluate", packed, "--reference", packed, "--reference-adapter", out, "--adapter", adapter, *measured
    )
    assert beside.code == 0, beside.err
    assert beside.json["kl"]["mean"] < 1e-9
    merged = [
        fewbit("merge", packed, each, "-o", tmp_path / f"{each.name}-merged", *measured) for each in (out, adapter)
    ]
    assert merged[0].code == 0, merged[0].err
    found, wanted = (models.tensors_of(tmp_path / f"{each.name}-merged") for each in (out, adapter))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("glm4_moe", r".*shared_experts\.down_proj"),
        ("glm4_moe", r".*layers\.0\.mlp\.gate_proj"),
        ("llama4_text", r".*shared_expert\.up_proj"),
    ],
)
def test_modules_named_as_those_of_experts_keep_their_adapter(kind: str, name: str, tmp_path: Path) -> None:
    """PEFT takes them for fused experts, and refuses the adapter or loses it."""
    folder = gguf_files.save(tmp_path / "m", kind)
    adapter = drawn(folder, tmp_path / "adapter", target_modules=name)
    package.convert(adapter, tmp_path / "lora.gguf", to="gguf", base=folder)
    wanted, ids = models.logits(attach(unpacked(folder), adapter), IDS[:, :12]), IDS[:, :12]
    assert not torch.allclose(models.logits(package.load(folder), ids), wanted, atol=1e-2)
    for each in (adapter, tmp_path / "lora.gguf"):
        torch.testing.assert_close(models.logits(package.load(folder, adapter=each), ids), wanted)


def test_matrices_of_other_types_are_read(model: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    drawn(model, tmp_path / "adapter", r=32, target_modules=["q_proj", "down_proj"])
    out, other = tmp_path / "lora.gguf", tmp_path / "other.gguf"
    assert fewbit("convert", tmp_path / "adapter", "-o", out, "--to", "gguf", "--base", model).code == 0
    stored_as(out, other, ["q8_0", "f16", "bf16"], **{"adapter.lora.alpha": 0.0})
    before, whole, found = (models.logits(package.load(model, adapter=each), IDS) for each in (None, out, other))
    assert not torch.equal(found, whole)
    alpha = GgufFile(out).metadata["adapter.lora.alpha"]
    plain = models.logits(package.load(model, adapter=_scaled(tmp_path / "adapter", 32 / alpha)), IDS)
    assert (found - plain).norm() < 0.01 * (plain - before).norm()  # an alpha of 0 is a scale of 1


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_experts_share_no_copy_of_the_whole_layer(kind: str, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "mixtral")
    adapter = drawn(folder, tmp_path / "adapter", target_modules=r".*experts\.\d\.w[12]", r=32)
    package.convert(adapter, tmp_path / "lora.gguf", to="gguf", base=folder)
    file = GgufFile(stored_as(tmp_path / "lora.gguf", tmp_path / "other.gguf", [kind]))
    found = as_gguf._of_model(file, models.original(folder).config)[1]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found.values()}
    assert len(found) == 4 * file.entries["blk.0.ffn_gate_exps.weight.lora_a"].shape[0] * 2
    assert sum(storages.values()) == sum(tensor.nbytes for tensor in found.values())


def stored_as(file: Path, out: Path, kinds: list[str], **keys: Any) -> Path:
    """A copy of a file whose tensors are of these types in turn, with other values for some keys."""
    stored, entries = GgufFile(file), {}
    for number, (name, entry) in enumerate(stored.entries.items()):
        entries[name] = entry._replace(type=kinds[number % len(kinds)])
    with GgufWriter(out, {**stored.metadata, **keys}, list(entries.values())) as writer:
        for name, entry in entries.items():
            tensor = stored.get(name)
            if entry.type == "q8_0":
                rows = Method().quantize(tensor.flatten(0, -2), parse("q8_0"), None).weight.parts["blocks"]
                tensor = rows.view(entry.spec.shape)
            writer.add(name, tensor.to(entry.spec.dtype))
    return out


def _scaled(adapter: Path, factor: float) -> Path:
    models.edit_json(adapter / "adapter_config.json", lora_alpha=6 * factor)
    return adapter


def test_scales_of_awq_travel_with_the_file(model: Path, text: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    quantize.quantize(model, tmp_path / "awq", plan="awq-4bit", calibration=str(text))
    tuning = Tuning(length=32, batch=8, learning_rate=0.01, steps=2, rank=4)
    package.finetune(tmp_path / "awq", tmp_path / "adapter", data=str(text), tuning=tuning)
    assert scales.read_record(tmp_path / "adapter")
    out = tmp_path / "lora.gguf"
    answer = fewbit("convert", tmp_path / "adapter", "-o", out, "--to", "gguf", "--json")
    assert answer.code == 0, answer.err
    assert "trained on a model with AWQ's scales" in answer.json["notes"][0]
    for base in ("awq", model):
        both = [
            models.logits(package.load(tmp_path / base, adapter=each, dtype="float32"), IDS)
            for each in (out, tmp_path / "adapter")
        ]
        assert torch.equal(*both)


# --- what cannot be such a file, and files that are none ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["lm_head"]}, "the model's output head is its embedding"),
    ],
)
def test_what_llama_cpp_does_not_have(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    adapter, out = drawn(model, tmp_path / "adapter", **settings), tmp_path / "outputs" / "lora.gguf"
    check(fewbit("convert", adapter, "-o", out, "--to", "gguf", "--base", model), 2, words)
    assert not out.parent.exists()


def test_a_weight_that_llama_cpp_adds_no_lora_to(tmp_path: Path, fewbit: Fewbit) -> None:
    folder = gguf_files.save(tmp_path / "m", "deepseek_v3")
    for name, words in (("q_a_proj", "ignores a LoRA of attn_q_a"), ("kv_b_proj", "attn_kv_b as a plain matrix")):
        adapter = drawn(folder, tmp_path / name, target_modules=[name])
        answer = fewbit("convert", adapter, "-o", tmp_path / "lora.gguf", "--to", "gguf", "--base", folder)
        check(answer, 2, words, "Train without this module")


IGNORED = {
    "minicpm3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "deepseek_v32": ("indexer.wq_b", "indexer.wk", "indexer.weights_proj"),
    "glm_moe_dsa": ("indexer.wq_b", "indexer.wk", "indexer.weights_proj"),
    "kimi_linear": ("o_proj", "k_proj", "g_b_proj"),
    "gemma4_text": ("per_layer_model_projection",),
    "gemma3n_text": (
        "per_layer_model_projection",
        "altup_projections.0",
        "altup_unembed_projections.1",
        "altup.modality_router",
    ),
}


@pytest.mark.parametrize(("family", "module"), [(kind, each) for kind, names in IGNORED.items() for each in names])
def test_a_lora_that_llama_cpp_ignores_is_refused(family: str, module: str, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", family)
    adapter = drawn(folder, tmp_path / "adapter", target_modules=[module])
    with pytest.raises(PlanError, match=r"llama\.cpp ignores a LoRA of"):
        package.convert(adapter, tmp_path / "lora.gguf", to="gguf", base=folder)


@pytest.mark.parametrize("module", ["prediction_coefs", "correction_coefs", "per_layer_input_gate"])
def test_other_matrices_of_gemma_3n_may_have_a_lora(module: str, tmp_path: Path) -> None:
    """llama.cpp adds these."""
    folder = gguf_files.save(tmp_path / "m", "gemma3n_text")
    adapter = drawn(folder, tmp_path / "adapter", target_modules=[module])
    package.convert(adapter, tmp_path / "lora.gguf", to="gguf", base=folder)
    assert len(GgufFile(tmp_path / "lora.gguf").entries) == 2 * 12


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_a_lora_of_positions_is_refused(family: str, tmp_path: Path, fewbit: Fewbit) -> None:
    folder = gguf_files.save(tmp_path / "m", family)
    adapter = drawn(folder, tmp_path / "adapter", target_modules=["wpe"])
    answer = fewbit("convert", adapter, "-o", tmp_path / "lora.gguf", "--to", "gguf", "--base", folder)
    check(answer, 2, "transformer.wpe", "llama.cpp adds a LoRA to no other embedding", "Train without this module")


def test_an_embedding_of_another_vocabulary(tmp_path: Path, fewbit: Fewbit) -> None:
    folder = gguf_files.save(tmp_path / "m", "phi")
    adapter = drawn(folder, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    tensors, _ = read_file(adapter / ADAPTER_WEIGHTS)
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    rows = tensors[name].shape[1]
    write_file(adapter / ADAPTER_WEIGHTS, tensors | {name: torch.zeros(4, rows + 1)}, {"format": "pt"})
    answer = fewbit("convert", adapter, "-o", tmp_path / "lora.gguf", "--to", "gguf", "--base", folder)
    check(answer, 2, "another model", f"lora_embedding_A [4, {rows + 1}]: the model's weight there is [{rows}, 64]")
    with pytest.raises(PlanError, match=rf"lora_embedding_A \[4, {rows + 1}\]: the model's weight there is"):
        package.load(folder, adapter=adapter)


def test_an_embedding_has_no_lora_of_a_linear(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "gpt2")
    keys: dict[str, Any] = {"general.architecture": "gpt2", "general.type": "adapter"}
    keys |= {"adapter.type": "lora", "adapter.lora.alpha": 4.0}
    both = {"position_embd.weight.lora_a": torch.zeros(4, 64), "position_embd.weight.lora_b": torch.zeros(64, 4)}
    with GgufWriter(tmp_path / "a.gguf", keys, [Entry(n, "f32", tuple(t.shape)) for n, t in both.items()]) as writer:
        for name, tensor in both.items():
            writer.add(name, tensor)
    with pytest.raises(PlanError, match=r"wpe\.lora_A\.weight \[4, 64\]: the model has an embedding there"):
        package.load(folder, adapter=tmp_path / "a.gguf")


def test_an_adapter_is_of_the_architecture_of_its_base(tmp_path: Path, fewbit: Fewbit) -> None:
    """llama.cpp refuses an adapter of another one, and a Mistral may be in a file of Llama or of Mistral 3."""
    folder = gguf_files.save(tmp_path / "m", "mistral", sliding_window=None)
    file = gguf_files.written(folder, tmp_path / "m.gguf")
    other = gguf_files.renamed(file, tmp_path / "other.gguf", "mistral3")
    adapter = drawn(folder, tmp_path / "adapter")
    for base, name in ((folder, "llama"), (file, "llama"), (other, "mistral3")):
        out = tmp_path / f"{base.stem}-lora.gguf"
        answer = fewbit("convert", adapter, "-o", out, "--to", "gguf", "--base", base, "--overwrite")
        assert answer.code == 0, answer.err
        assert GgufFile(out).metadata["general.architecture"] == name
    wanted = models.logits(package.load(other, adapter=adapter, dtype="float32"), IDS)
    for out in (tmp_path / "m-lora.gguf", tmp_path / "other-lora.gguf"):
        assert torch.equal(models.logits(package.load(other, adapter=out, dtype="float32"), IDS), wanted)


UNUSED: list[tuple[str, list[Any]]] = [
    ("--requantize", []),
    ("--plan", ["q4_k_m"]),
    ("--imatrix", [__file__]),
    ("--text", ["tiny"]),
    ("--length", [32]),
    ("--samples", [4]),
    ("--calibration", ["tiny"]),
    ("--max-shard", ["1GB"]),
    ("--set", ["general.name=x"]),
]


def test_adapters_that_cannot_be_converted(model: Path, adapter: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    out = tmp_path / "lora.gguf"

    def refused(code: int, *words: str, flags: tuple[Any, ...] = (), of: Path = adapter) -> None:
        check(fewbit("convert", of, "-o", out, *(flags or ("--to", "gguf"))), code, *words)

    wide = models.save(tmp_path / "wide", "llama", hidden_size=128)
    opt = models.save(tmp_path / "opt", "opt")
    refused(2, "an adapter for another model", flags=("--to", "gguf", "--base", wide))
    refused(2, "an adapter for another model", flags=("--to", "gguf", "--base", opt))
    refused(2, "would be a GGUF file, but --to gptq makes a folder", flags=("--to", "gptq"))
    check(fewbit("convert", adapter, "-o", tmp_path / "folder", "--to", "gptq"), 2, "converted to a GGUF file only")
    for flag, value in UNUSED:
        refused(2, flag, "no effect on an adapter", flags=("--to", "gguf", flag, *value))
    refused(2, "is an adapter, and a preview", flags=("--to", "gguf", "--dry-run"))
    refused(2, "--base", "without an adapter", flags=("--to", "gguf", "--base", model), of=model)
    lost = drawn(model, tmp_path / "lost")
    models.edit_json(lost / "adapter_config.json", base_model_name_or_path="/nowhere")
    refused(2, "/nowhere", "Give --base", of=lost)
    models.edit_json(lost / "adapter_config.json", base_model_name_or_path=None)
    refused(2, "does not name its model", of=lost)
    assert not out.exists()


def test_files_that_are_no_adapter_of_the_model(
    model: Path, packed: Path, adapter: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    out, bad = tmp_path / "lora.gguf", tmp_path / "bad.gguf"
    assert fewbit("convert", adapter, "-o", out, "--to", "gguf").code == 0
    file = GgufFile(out)
    tensors = {name: file.get(name).clone() for name in file.entries}

    def refused(words: str, keys: dict[str, Any], other: dict[str, Any], error: type[Exception] = FormatError) -> None:
        kept = {name: tensor for name, tensor in {**tensors, **other}.items() if tensor is not None}
        entries = [Entry(name, "f32", tuple(tensor.shape)) for name, tensor in kept.items()]
        with GgufWriter(bad, {**file.metadata, **keys}, entries, overwrite=True) as writer:
            for name, tensor in kept.items():
                writer.add(name, tensor)
        with pytest.raises(error, match=words):
            package.load(model, adapter=bad)

    a, b = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
    refused(r"general\.type is 'model'", {"general.type": "model"}, {})
    refused("of type 'lokr'", {"adapter.type": "lokr"}, {})
    for each in (["adapter"], np.arange(2)):
        refused(r"its general\.type is", {"general.type": each}, {})
        refused("is an adapter of type", {"adapter.type": each}, {})
        refused("of llama.cpp's architecture", {"general.architecture": each}, {}, PlanError)
    refused("only one of lora_a and lora_b", {}, {b: None})
    refused("do not belong together", {}, {b: torch.zeros(256, 3)})
    refused("is no matrix of a LoRA", {}, {"blk.0.attn_norm.weight": torch.zeros(256)})
    beyond = {name.replace(".0.", ".9."): tensors[name] for name in (a, b)}
    refused(r"for another model: this one has no blk\.9", {}, beyond, PlanError)
    refused("an adapter for another model", {}, {a: torch.zeros(4, 96), b: torch.zeros(256, 4)}, PlanError)
    refused("is 'llama'", {"general.architecture": "qwen2"}, {}, PlanError)
    with pytest.raises(FormatError, match=r"is no adapter: its general\.type is 'model'"):
        package.load(model, adapter=packed)
    (tmp_path / "x.bin").write_text("nothing", encoding="utf-8")
    with pytest.raises(PlanError, match=r"this is a file"):
        package.load(model, adapter=tmp_path / "x.bin")
    bad.write_bytes(out.read_bytes()[:-100])
    with pytest.raises(FormatError):
        package.load(model, adapter=bad)
    check(fewbit("generate", out, "the"), 3, "is a LoRA adapter, not a model", "--adapter")
