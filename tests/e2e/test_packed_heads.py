"""An output head that is quantized, in a folder: beside an embedding that is not, whatever config.json says of ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import PlanError
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import Plan, Rule
from tests import models, packed_models
from tests.e2e.conftest import Fewbit

IDS = torch.arange(3, 27)[None]
BLOCKS = Rule("*", "int4-g32-sym")
HEAD = Rule("lm_head", "int8-g32-sym")
FORMATS = ("gptq", "compressed-tensors")
FEW = fewbit.Calibration(samples=2, length=32)


def compressed_tensors(folder: Path, layout: str, *, tied: bool) -> Any:
    """A model whose blocks are in 4 bits and whose head has another layout, as llm-compressor writes it.

    Returns it with the weights that it means.
    """
    models.save(folder / "plain", "llama", tie_word_embeddings=tied, dtype="float32")
    floats = models.tensors_of(folder / "plain")
    model = models.original(folder / "plain")
    stored, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            packer, _, _ = packed_models.LAYOUTS[layout if name == "lm_head" else "ct-int4"]
            parts, meant[name] = packer(module.weight)
            stored |= {f"{name}.{part}": each.contiguous() for part, each in parts.items()}
            floats.pop(f"{name}.weight", None)
    _, blocks, _ = packed_models.LAYOUTS["ct-int4"]
    _, head, _ = packed_models.LAYOUTS[layout]
    groups = {
        "group_0": {**blocks["config_groups"]["group_0"], "format": "pack-quantized"},
        "group_1": {**head["config_groups"]["group_0"], "targets": ["re:.*lm_head"]},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []}
    packed_models.written(folder / "plain", folder / "packed", floats, floats | stored, config)
    untied = models.build("llama", tie_word_embeddings=False, dtype="float32")
    untied.model.load_state_dict(model.model.state_dict())
    return models.with_weights(untied, meant)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["ct-int4", "ct-fp8"])
def test_it_is_read_packed_whatever_the_config_ties(layout: str, tied: bool, tmp_path: Path) -> None:
    wanted = models.logits(compressed_tensors(tmp_path, layout, tied=tied), IDS)
    for load in (fewbit.load, AutoModelForCausalLM.from_pretrained):
        model: Any = load(tmp_path / "packed", dtype=torch.float32)
        assert isinstance(model.lm_head, QLinear)
        assert isinstance(model.model.embed_tokens, torch.nn.Embedding)
        got = models.logits(model, IDS)
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5
        assert torch.equal(model.generate(IDS, max_new_tokens=1, do_sample=False)[0, -1], wanted[0, -1].argmax())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(models.logits(fewbit.load(tmp_path / "again", dtype=torch.float32), IDS), got)
    assert not fewbit.load(tmp_path / "again").config.tie_word_embeddings


def test_it_is_decoded_beside_the_embedding(tmp_path: Path) -> None:
    wanted = models.logits(compressed_tensors(tmp_path, "ct-fp8", tied=True), IDS)
    fewbit.convert(tmp_path / "packed", tmp_path / "dense", to="dense")
    got = models.logits(models.original(tmp_path / "dense"), IDS)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def plan_of(format: str, *rules: Rule, **options: Any) -> Plan:
    return Plan("mine", format, rules, **options)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_rule_that_names_the_head_packs_it(format: str, tied: bool, tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", tie_word_embeddings=tied)
    plan = plan_of(format, BLOCKS, HEAD)  # `*` comes first and leaves the head as it is
    shown = fewbit.preview(source, plan=plan)
    done = fewbit.quantize(source, tmp_path / "out", plan=plan)
    tensors = models.tensors_of(tmp_path / "out")
    assert done.output_bytes == shown.output_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {name for name in tensors if name.startswith("lm_head")} == (
        {f"lm_head.{end}" for end in ("qweight", "qzeros", "scales", "g_idx")}
        if format == "gptq"
        else {f"lm_head.{end}" for end in ("weight_packed", "weight_scale", "weight_shape")}
    )
    before = models.tensors_of(source)
    assert shown.original_bytes == sum(tensor.nbytes for tensor in before.values())
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert shown.unquantized["embeddings"] == before["model.embed_tokens.weight"].nbytes
    own = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("lm_head"))
    said = [note for note in shown.notes if f"of {own:,} bytes, and config.json says that they are not tied" in note]
    assert len(said) == tied
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    if format == "gptq":
        assert config["quantization_config"]["lm_head"] is True
        assert config["quantization_config"]["dynamic"] == {r"+:^lm_head$": {"bits": 8}}
    else:
        assert config["quantization_config"]["ignore"] == []
        assert config["quantization_config"]["config_groups"]["group_1"]["targets"] == ["lm_head"]
    (report,) = [each for each in done.tensors if each.module == "lm_head"]
    assert (report.scheme.removesuffix("-bf16"), report.method) == ("int8-g32-sym", "rtn")
    assert sum(fewbit.inspect(tmp_path / "out").schemes.values()) == 15

    model = fewbit.load(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.lm_head, QLinear)
    values = model.lm_head.qtensor().dequantize()
    head = models.original(source).lm_head.weight
    assert float((values - head).norm() / head.norm()) < 0.02
    plain = models.build("llama", tie_word_embeddings=False, dtype="float32")
    rest = {name: layer.qtensor().dequantize() for name, layer in model.named_modules() if isinstance(layer, QLinear)}
    plain.load_state_dict(models.original(source).state_dict())
    wanted = models.logits(models.with_weights(plain, rest), IDS)
    got = models.logits(model, IDS)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(models.logits(theirs, IDS), got)


@pytest.mark.parametrize("format", FORMATS)
def test_a_head_in_the_scheme_of_the_blocks(format: str, tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama")
    rules = [Rule(match, "int4-g32-sym", "gptq") for match in ("lm_head", "*")]
    done = fewbit.quantize(source, tmp_path / "out", plan=plan_of(format, *rules), calibration=FEW)
    assert {each.method for each in done.tensors if each.module == "lm_head"} == {"imatrix"}  # nothing is measured
    config = config_of(tmp_path / "out")["quantization_config"]
    if format == "gptq":
        assert (config["lm_head"], config["dynamic"]) == (True, {})
    else:  # vLLM finds the head by its name only
        assert [group["targets"] for group in config["config_groups"].values()] == [["Linear", "lm_head"]]
    assert isinstance(fewbit.load(tmp_path / "out").lm_head, QLinear)


def test_the_methods_of_blocks_alone_need_a_text(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama")
    plan = plan_of("gptq", BLOCKS, Rule("lm_head", "int8-g32-sym", "gptq"))
    fewbit.quantize(source, tmp_path / "out", plan=plan)
    assert packed_models.record(tmp_path / "out")["calibration"] is None


def test_a_head_that_its_config_does_not_call_tied(tmp_path: Path) -> None:
    """Gemma's config ties the head unless it says otherwise."""
    source = models.save(tmp_path / "source", "gemma", tie_word_embeddings=True)
    config = config_of(source)
    (source / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "tie_word_embeddings"}), encoding="utf-8"
    )
    fewbit.quantize(source, tmp_path / "out", plan=plan_of("gptq", HEAD, BLOCKS))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert isinstance(fewbit.load(tmp_path / "out").lm_head, QLinear)


def test_a_head_that_does_not_fit_stays_tied(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", vocab_size=289)
    with pytest.raises(PlanError, match="packs rows and columns by 32, which does not divide 289 x 64"):
        fewbit.preview(source, plan=plan_of("gptq", HEAD, BLOCKS))
    done = fewbit.quantize(source, tmp_path / "out", plan=plan_of("gptq", HEAD, BLOCKS, adapt=True))
    assert [note for note in done.notes if "lm_head stays as it is" in note]
    tensors = models.tensors_of(tmp_path / "out")
    assert not [name for name in tensors if name.startswith("lm_head")]
    assert config_of(tmp_path / "out")["tie_word_embeddings"]
    assert config_of(tmp_path / "out")["quantization_config"]["lm_head"] is False


def test_a_head_needs_no_scale_of_its_inputs(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama")
    rules = [Rule("lm_head", "nvfp4", "gptq"), Rule("*", "nvfp4", "gptq")]
    with pytest.raises(PlanError, match=r"lm_head.*scale that fewbit does not measure"):
        fewbit.preview(source, plan=plan_of("compressed-tensors", *rules, activations="dynamic"))
    fewbit.preview(source, plan=plan_of("compressed-tensors", *rules))


@pytest.mark.parametrize("tied", [False, True])
def test_its_width_is_chosen_too(tied: bool, tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", tie_word_embeddings=tied)
    plan = plan_of("gptq", Rule("*", "int4-g32-sym", "gptq"), HEAD)
    done = fewbit.quantize(source, tmp_path / "out", plan=plan, calibration=FEW, budget=fewbit.Budget(bits=4.6))
    (report,) = [each for each in done.tensors if each.module == "lm_head"]
    assert report.method == "rtn"
    assert packed_models.record(tmp_path / "out")["plan"]["rules"][-1]["match"] == "lm_head"
    assert isinstance(fewbit.load(tmp_path / "out").lm_head, QLinear)
    own = sum(t.nbytes for name, t in models.tensors_of(tmp_path / "out").items() if name.startswith("lm_head"))
    assert [f"of {own:,} bytes" in note for note in done.notes if "lm_head" in note] == [True] * tied


def test_other_verbs_take_a_packed_head(tmp_path: Path, fewbit: Fewbit) -> None:
    source = models.save(tmp_path / "source", "llama", tie_word_embeddings=True, dtype="float32")
    (tmp_path / "plan.json").write_text(json.dumps(plan_of("gptq", BLOCKS, HEAD).to_json()), encoding="utf-8")
    made, length = tmp_path / "made", ("--length", 32, "--samples", 2)
    for command in (
        ("quantize", source, "-o", made, "--plan", tmp_path / "plan.json"),
        ("evaluate", made, "--reference", source, *length),
        ("tune", made, "-o", tmp_path / "tuned", "--reference", source, "--steps", 4, "--length", 32, "--samples", 4),
        ("estimate", source, "--plan", tmp_path / "plan.json"),
        ("quantize", made, "--plan", tmp_path / "plan.json", "--dry-run"),
    ):
        answer = fewbit(*command)
        assert answer.code == 0 or (command[0] == "tune" and "KL divergence" in answer.err), answer.err
    answer = fewbit("doctor", made, "--json")
    assert sum(answer.json["model"]["products"].values()) == 15


def test_a_conversion_keeps_it_packed(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", tie_word_embeddings=True, dtype="float32")
    fewbit.quantize(source, tmp_path / "gptq", plan=plan_of("gptq", HEAD, BLOCKS))
    fewbit.convert(tmp_path / "gptq", tmp_path / "v2", to="gptq-v2")
    fewbit.convert(tmp_path / "v2", tmp_path / "ct", to="compressed-tensors")
    fewbit.convert(tmp_path / "ct", tmp_path / "file.gguf", to="gguf")
    done = fewbit.convert(tmp_path / "file.gguf", tmp_path / "back", to="gptq")
    assert not done.decoded
    packed_models.same_files(tmp_path / "back", tmp_path / "gptq")
    assert config_of(tmp_path / "back")["quantization_config"]["lm_head"] is True
    wanted = models.logits(fewbit.load(tmp_path / "gptq", dtype=torch.float32), IDS)
    for name in ("v2", "ct"):
        assert torch.equal(models.logits(fewbit.load(tmp_path / name, dtype=torch.float32), IDS), wanted)
    done = fewbit.convert(tmp_path / "gptq", tmp_path / "awq", to="awq")
    assert list(done.decoded) == ["lm_head"]


def test_a_conversion_decodes_a_head_that_does_not_fit(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", tie_word_embeddings=False)
    plan = plan_of("gguf", Rule("lm_head", "q5_1"), Rule("*", "q4_0"))
    fewbit.quantize(source, tmp_path / "file.gguf", plan=plan)
    done = fewbit.convert(tmp_path / "file.gguf", tmp_path / "out", to="gptq")
    assert set(done.decoded) == {"lm_head", "model.embed_tokens"}
    assert config_of(tmp_path / "out")["quantization_config"]["lm_head"] is False
