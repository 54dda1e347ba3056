"""AWQ: its files load through transformers' own `from_pretrained`, rewritten norms are in them, and runs resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.api import evaluate, quantize
from fewbit.formats.awq import AWQFormat
from fewbit.formats.containers.safetensors import write_file
from fewbit.nn.layers import QLinear
from fewbit.pipeline import progress, rewrite
from fewbit.plans.plan import find
from fewbit.texts import calibration
from tests import models


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-sym"])
def test_files_load_packed_and_are_saved_as_they_were(family: str, scheme: str, ids: Tensor, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "original", family)
    plan = find("rtn-4bit").changed(scheme=scheme)
    quantize.quantize(folder, tmp_path / "gptq", plan=plan)
    quantize.quantize(folder, tmp_path / "awq", plan=plan.changed(format="awq"))
    config = models.quantization_of(tmp_path / "awq")
    assert config["quant_method"] == "awq"
    assert config["modules_to_not_convert"] == ["lm_head"]
    same, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval() for name in ("gptq", "awq")
    )
    packed = [module for module in model.modules() if isinstance(module, QLinear)]
    assert len(packed) == len([module for module in same.modules() if isinstance(module, QLinear)]) > 0
    assert {str(module.codec) for module in packed} == {scheme}
    assert distance(models.logits(model, ids), models.logits(same, ids)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    before, after = models.tensors_of(tmp_path / "awq"), models.tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.to(after[name].dtype), after[name]) for name, tensor in before.items())
    again = fewbit.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(models.logits(again, ids), models.logits(model, ids))


def test_a_gemv_file_of_others_loads(ids: Tensor, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "original", "mistral")
    quantize.quantize(folder, tmp_path / "gemm", plan=find("rtn-4bit").changed(scheme="int4-g32", format="awq"))
    written = AWQFormat()
    config = models.quantization_of(tmp_path / "gemm")
    gemm = models.tensors_of(tmp_path / "gemm")
    rest = {name: tensor for name, tensor in gemm.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    gemv = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMV"}
    for module in {name.rpartition(".")[0] for name in gemm.keys() - rest.keys()}:
        own = {suffix: gemm[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        laid_out = written.lay_out(written.read(own, config, module), gemv)
        rest |= {f"{module}.{suffix}": tensor for suffix, tensor in laid_out.items()}
    expected = models.logits(fewbit.load(tmp_path / "gemm", dtype=torch.float32), ids)
    write_file(tmp_path / "gemm" / "model.safetensors", rest)
    models.edit_json(tmp_path / "gemm" / "config.json", quantization_config=gemv)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemm", dtype=torch.float32).eval()
    assert torch.equal(models.logits(model, ids), expected)


class _Stop(Exception):
    pass


def stop(step: progress.Step) -> None:
    if step.done == 2:
        raise _Stop


def check_whole_model(root: Path, family: str, text: Path) -> None:
    """At 8 bits the model is still the original, though what is not quantized has changed in its files."""
    folder, out = models.save(root / "original", family), root / "out"
    plan = find("awq-4bit").changed(scheme="int8-g32", format="gptq", options={"grid": "4"})
    done = quantize.quantize(
        folder, out, plan=plan, calibration=calibration.Calibration(str(text), 6, 32), overwrite=True
    )
    assert {tensor.method for tensor in done.tensors} == {"awq"}
    before, after = models.tensors_of(folder), models.tensors_of(out)
    rest = [name for name in after if name in before]
    assert all(after[name].dtype == before[name].dtype for name in rest)
    assert [name for name in rest if not torch.equal(after[name], before[name])]
    ids = torch.randint(3, models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    model = fewbit.load(out, dtype=torch.float32)
    assert distance(models.logits(model, ids), models.logits(models.original(folder), ids)) < 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "opt-350m"])
def test_at_8_bits_a_model_is_still_itself(family: str, text: Path, tmp_path: Path) -> None:
    check_whole_model(tmp_path, family, text)


def check_resumed(root: Path, text: Path) -> None:
    """A run that stopped after two of three blocks ends in the same bytes as one that did not."""
    if not (root / "original").exists():
        models.save(root / "original", "qwen2", num_hidden_layers=3)
    plan = find("awq-4bit").changed(method="awq+gptq", scheme="int4-g32", options={"grid": "4"})
    wanted = calibration.Calibration(str(text), 6, 32)
    with pytest.raises(_Stop):
        quantize.quantize(root / "original", root / "out", plan=plan, calibration=wanted, progress=stop)
    steps: list[progress.Step] = []
    quantize.quantize(
        root / "original", root / "out", plan=plan, calibration=wanted, progress=steps.append, overwrite=True
    )
    assert [step.resumed for step in steps] == [True, True, False]
    quantize.quantize(root / "original", root / "straight", plan=plan, calibration=wanted, overwrite=True)
    ours, theirs = models.tensors_of(root / "out"), models.tensors_of(root / "straight")
    before = models.tensors_of(root / "original")
    assert not torch.equal(
        ours["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"]
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    (root / "out").rename(root / "done")


def test_a_run_goes_on_with_norms_as_they_were_rewritten(text: Path, tmp_path: Path) -> None:
    check_resumed(tmp_path, text)


def test_on_the_embedded_model_it_loses_less_than_rounding(tmp_path: Path) -> None:
    few, away = calibration.Calibration(samples=4, length=256), {}
    for method, options in (("rtn", {}), ("awq", {"grid": "5"})):
        plan = find("awq-4bit").changed(method=method, options=options)
        done = quantize.quantize("tiny", tmp_path / method, plan=plan, calibration=few)
        assert {(tensor.method, tensor.scheme) for tensor in done.tensors} == {(method, "int4-g128")}
        assert not [tensor.notes for tensor in done.tensors if tensor.notes]
        kl = evaluate.evaluate(tmp_path / method, reference="tiny", samples=3, length=512).quality.kl
        assert kl is not None
        away[method] = kl.mean.value
    assert away["awq"] < 0.9 * away["rtn"]


def test_methods_compose_over_a_whole_model(text: Path, tmp_path: Path) -> None:
    folder, away = models.save(tmp_path / "original", "llama"), {}
    # Of the kind that it is calibrated on: a random model's inputs of another kind are another distribution.
    ids = torch.tensor([models.tokenizer().encode(models.sentences(3, seed=8))])
    wanted = models.logits(models.original(folder), ids)
    for method, options in (("rtn", {}), ("awq", {"grid": "5"}), ("awq+gptq", {"grid": "5"})):
        plan = find("awq-4bit").changed(method=method, scheme="int4-g32", options=options)
        done = quantize.quantize(
            folder, tmp_path / method, plan=plan, calibration=calibration.Calibration(str(text), 24, 48)
        )
        assert {tensor.method for tensor in done.tensors} == {method}
        away[method] = distance(models.logits(fewbit.load(tmp_path / method, dtype=torch.float32), ids), wanted)
    assert away["awq+gptq"] < away["awq"] < away["rtn"], away


def test_where_every_fold_fails_ranges_are_clipped(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.save(tmp_path / "original", "llama")
    wanted, plan = (
        calibration.Calibration(str(text), 6, 32),
        find("awq-4bit").changed(scheme="int4-g32", options={"grid": "2"}),
    )
    monkeypatch.setattr(rewrite, "_CLOSE", -1.0)
    done = quantize.quantize(folder, tmp_path / "out", plan=plan, calibration=wanted)
    said = [note for tensor in done.tensors for note in tensor.notes]
    assert len(done.tensors) == 14
    assert [note for note in said if "would change the block's output by" in note]
    clipped = plan.changed(options={"grid": "0"})
    quantize.quantize(folder, tmp_path / "clipped", plan=clipped, calibration=wanted)
    ours, theirs = models.tensors_of(tmp_path / "out"), models.tensors_of(tmp_path / "clipped")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_could_not_be_folded_is_in_the_record(text: Path, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "original", "opt-350m")
    plan = find("awq-4bit").changed(scheme="int4-g32", options={"grid": "2"})
    quantize.quantize(folder, tmp_path / "out", plan=plan, calibration=calibration.Calibration(str(text), 6, 32))
    record = json.loads((tmp_path / "out" / "fewbit.json").read_text(encoding="utf-8"))
    notes = {tensor["module"].rpartition(".")[2]: tensor["notes"] for tensor in record["tensors"]}
    assert {name for name, said in notes.items() if said} == {"q_proj", "k_proj", "v_proj", "fc1"}
    assert all("can take the scales" in said[0] for said in notes.values() if said)
