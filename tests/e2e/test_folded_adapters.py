"""An adapter that was trained on a model with AWQ's scales does the same on its original, and the other way round."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig

import fewbit as package
from fewbit import PlanError
from fewbit.api import quantize
from fewbit.models import scales
from fewbit.models.adapters.attach import folded, quiet
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.source import locate
from fewbit.plans.plan import Plan, Rule, find
from tests import models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_bad_input import check

IDS = torch.randint(3, models.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
PLAN = find("awq-4bit").changed(scheme="int4-g32")
EXACT = 1e-5  # relative distance of logits in float32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with `model`, `awq` made from it, and `unfolded`: the values of `awq` without its scales."""
    place = tmp_path_factory.mktemp("folded")
    model = models.save(place / "model", request.param, dtype="float32")
    quantize.quantize(model, place / "awq", plan=PLAN, calibration=str(text))
    shutil.copytree(model, place / "unfolded")
    unfolded(model, package.load(place / "awq")).save_pretrained(place / "unfolded")
    for name in ("awq", "unfolded"):
        tuning = Tuning(length=32, batch=8, learning_rate=0.01, steps=6, held_out=0)
        package.finetune(place / name, place / f"adapter-{name}", data=str(text), tuning=tuning)
    return place


def unfolded(model: Path, plain: Any) -> Any:
    """The model of the values that a packed one stands for, its scales divided out."""
    found = scales.of_model(plain) or scales.Scales()
    plain.dequantize()
    state, values = models.original(model), plain.state_dict()
    with torch.no_grad():
        for name, parameter in state.named_parameters():
            module, _, leaf = name.rpartition(".")
            value = values[name].double()
            conv = type(state.get_submodule(module)).__name__ == "Conv1D" and leaf == "weight"
            value = value.T if conv else value
            if leaf == "weight" and (columns := found.columns([module])) is not None:
                value = value / columns.double()
            if (rows := found.rows([module])) is not None:
                value = value * (rows.double() if value.dim() == 1 else rows.double()[:, None])
            parameter.copy_(value.T if conv else value)
    return state


def adapted(model: Path, adapter: Path) -> Any:
    with quiet():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()


def test_the_record_says_what_was_folded(place: Path) -> None:
    found, record = scales.read(place / "awq"), json.loads((place / "awq" / "fewbit.json").read_text(encoding="utf-8"))
    assert {name.rpartition(".")[2] for name in found.values if name.startswith("rows:")} == (
        {"c_attn", "ln_1", "ln_2"}
        if "rows:transformer.h.0.ln_1" in found.values
        else {"input_layernorm", "post_attention_layernorm", "up_proj", "v_proj"}
    )
    assert record["scales"]["digest"] == found.digest
    assert "fewbit.scales" in record["files"]
    assert found.origin == str(place / "model")
    assert [file.name for file in (place / "awq").glob("*.safetensors")] == ["model.safetensors"]
    wanted = models.logits(package.load(place / "awq"), IDS)
    assert apart(models.logits(models.original(place / "unfolded"), IDS), wanted) < EXACT


@pytest.mark.parametrize(("trained", "other"), [("awq", "unfolded"), ("unfolded", "awq")])
def test_an_adapter_does_on_one_what_it_does_on_the_other(trained: str, other: str, place: Path) -> None:
    wanted = models.logits(package.load(place / trained, adapter=place / f"adapter-{trained}"), IDS)
    assert apart(wanted, models.logits(package.load(place / trained), IDS)) > 0.1
    assert apart(models.logits(package.load(place / other, adapter=place / f"adapter-{trained}"), IDS), wanted) < EXACT
    assert apart(models.logits(adapted(place / other, place / f"adapter-{trained}"), IDS), wanted) < EXACT


def test_what_peft_trains_and_saves_says_where_it_fits(place: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(place / "awq")
    with quiet():
        peft = get_peft_model(model, config)
    peft.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    wanted = models.logits(peft.eval(), IDS)
    assert apart(models.logits(adapted(place / "unfolded", tmp_path / "adapter"), IDS), wanted) < EXACT
    moved = adapted(place / "unfolded", tmp_path / "adapter")
    moved.save_pretrained(tmp_path / "moved", save_embedding_layers=False)
    for name in ("unfolded", "awq"):
        assert apart(models.logits(adapted(place / name, tmp_path / "moved"), IDS), wanted) < EXACT
    # Without its record the folder still names its base.
    (tmp_path / "adapter" / "fewbit.json").unlink()
    assert apart(models.logits(adapted(place / "unfolded", tmp_path / "adapter"), IDS), wanted) < EXACT


def test_a_merge_onto_the_original_is_the_folded_one(place: Path, tmp_path: Path) -> None:
    package.merge(place / "awq", place / "adapter-awq", tmp_path / "merged", base=place / "unfolded", length=24)
    wanted = models.logits(package.load(place / "awq", adapter=place / "adapter-awq"), IDS)
    assert apart(models.logits(models.original(tmp_path / "merged"), IDS), wanted) < EXACT
    done = package.merge(place / "awq", place / "adapter-awq", tmp_path / "onto", length=24)
    assert done.base == str(place / "model")
    before, after = models.original(place / "model"), models.original(tmp_path / "onto")
    found, weights = scales.read(place / "awq"), load_file(place / "adapter-awq" / "adapter_model.safetensors")
    keys = [key for key in weights if key.endswith("lora_A.weight")]
    assert keys
    for key in keys:
        a = weights[key]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = weights[key.replace("lora_A", "lora_B")]
        columns, rows = found.columns([name]), found.rows([name])
        a = a if columns is None else a / columns
        b = b if rows is None else b * rows[:, None]
        old, new = (models.linear_weight(m.get_submodule(name)) for m in (before, after))
        torch.testing.assert_close(new, old + 2 * b @ a, rtol=1e-5, atol=1e-6)


def test_a_merge_into_the_values_keeps_the_scales(place: Path, tmp_path: Path, text: Path) -> None:
    shutil.copytree(place / "awq", tmp_path / "awq")
    record = json.loads((tmp_path / "awq" / "fewbit.json").read_text(encoding="utf-8"))
    (tmp_path / "awq" / "fewbit.json").write_text(json.dumps({**record, "origin": None}), encoding="utf-8")
    done = package.merge(tmp_path / "awq", place / "adapter-awq", tmp_path / "merged", length=24)
    assert done.base is None
    assert scales.read(tmp_path / "merged").digest == scales.read(place / "awq").digest
    # A second fold, and an adapter of the original on the sum of both.
    quantize.quantize(tmp_path / "merged", tmp_path / "again", plan=PLAN, calibration=str(text))
    both, once = scales.read(tmp_path / "again"), scales.read(place / "awq")
    assert both.origin == str(place / "model")
    assert any(not torch.equal(both.values[name], tensor) for name, tensor in once.values.items())
    alone = unfolded(place / "model", package.load(tmp_path / "again"))
    alone.save_pretrained(tmp_path / "alone")
    wanted = models.logits(adapted(tmp_path / "alone", place / "adapter-unfolded"), IDS)
    got = models.logits(package.load(tmp_path / "again", adapter=place / "adapter-unfolded"), IDS)
    assert apart(got, wanted) < EXACT


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"), "DoRA's magnitudes"),
        (LoraConfig(target_modules="all-linear", bias="all", task_type="CAUSAL_LM"), "bias='all' replaces biases"),
        (
            LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
            "modules_to_save replaces weights",
        ),
        (IA3Config(task_type="CAUSAL_LM"), "only LoRA can be rescaled, not IA3"),
    ],
)
def test_what_cannot_be_moved_is_refused(config: Any, words: str, place: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    model = models.original(place / "model")
    with quiet():
        get_peft_model(model, copy.deepcopy(config)).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    answer = fewbit("generate", place / "awq", "The", "--adapter", tmp_path / "adapter")
    check(answer, 2, words, "AWQ scales differ", "Use it on the model that it was trained on.")
    with pytest.raises(PlanError, match="AWQ scales differ"):
        adapted(place / "awq", tmp_path / "adapter")
    assert fewbit("generate", place / "model", "The", "--adapter", tmp_path / "adapter").code == 0


def test_a_copy_without_scales_is_not_taken_for_the_original(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "awq")
    model.save_pretrained(tmp_path / "packed")
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    wanted = models.logits(package.load(place / "awq", adapter=place / "adapter-awq"), IDS)
    for name in ("packed", "plain"):
        with pytest.warns(UserWarning, match="the model does not record its AWQ scales"):
            found = package.load(tmp_path / name, adapter=place / "adapter-awq")
        assert apart(models.logits(found, IDS), wanted) < EXACT
    adapter = shutil.copytree(place / "adapter-awq", tmp_path / "adapter")
    (adapter / "fewbit.json").unlink()
    with pytest.raises(PlanError, match="does not record which scales AWQ folded"):
        package.merge(tmp_path / "packed", adapter, tmp_path / "out", base=place / "model")


def test_damaged_scales_are_refused(place: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    adapter = shutil.copytree(place / "adapter-awq", tmp_path / "adapter")
    (adapter / "fewbit.scales").unlink()
    command = ("generate", place / "awq", "The", "--adapter", adapter)
    check(fewbit(*command), 3, "does not contain the scales that fewbit.json")
    (adapter / "fewbit.scales").write_bytes(b"nothing")
    check(fewbit(*command), 3, "fewbit.scales (7 bytes) is not a valid safetensors file")


def test_quantized_on_load_it_knows_its_scales(place: Path, tmp_path: Path) -> None:
    config: Any = AwqConfig(bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(place / "model", quantization_config=config)
    assert scales.of_model(model)
    with quiet():
        adapter: Any = PeftModel.from_pretrained(model, place / "adapter-unfolded").eval()
    got = models.logits(adapter, IDS)
    unfolded(place / "model", adapter.unload()).save_pretrained(tmp_path)
    assert apart(models.logits(adapted(tmp_path, place / "adapter-unfolded"), IDS), got) < EXACT


@pytest.mark.parametrize(("trained", "other"), [("awq", "unfolded"), ("unfolded", "awq")])
def test_transformers_own_load_adapter_fits_too(
    trained: str, other: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers 5.24 asks for a PEFT that is newer than those that are published; 5.17 does not.
    import transformers.integrations.peft as theirs

    monkeypatch.setattr(theirs, "check_peft_version", lambda **_: None)
    wanted = models.logits(package.load(place / trained, adapter=place / f"adapter-{trained}"), IDS)
    model: Any = AutoModelForCausalLM.from_pretrained(place / other)
    with quiet():
        model.load_adapter(str(place / f"adapter-{trained}"))
    assert apart(models.logits(model.eval(), IDS), wanted) < EXACT


def test_transformers_own_save_says_where_it_fits(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's name is relative, and means nothing in another folder."""
    import transformers.integrations.peft as theirs

    monkeypatch.setattr(theirs, "check_peft_version", lambda **_: None)
    monkeypatch.chdir(place)
    model: Any = AutoModelForCausalLM.from_pretrained("awq")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with quiet():
        model.add_adapter(config)
        model.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    wanted = models.logits(model.eval(), IDS)
    assert apart(models.logits(adapted(place / "unfolded", tmp_path / "adapter"), IDS), wanted) < EXACT


def test_a_relative_base_counts_from_the_current_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trained, other in (("awq", "unfolded"), ("unfolded", "awq")):
        adapter = shutil.copytree(place / f"adapter-{trained}", tmp_path / trained)
        (adapter / "fewbit.json").unlink()
        models.edit_json(adapter / "adapter_config.json", base_model_name_or_path=trained)
        monkeypatch.chdir(place)
        wanted = models.logits(package.load(place / trained, adapter=adapter), IDS)
        with pytest.warns(UserWarning, match=f"names its model '{trained}', which is taken to be {place / trained}"):
            found = adapted(place / other, adapter)
        assert apart(models.logits(found, IDS), wanted) < EXACT
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="it does not record its model"):
        adapted(place / "awq", adapter)


def test_a_base_without_its_scales_is_said(place: Path, tmp_path: Path) -> None:
    """As other makers' AWQ folders: their scales are unknown, so that their adapters do not fit the original."""
    foreign = shutil.copytree(place / "awq", tmp_path / "foreign")
    for name in ("fewbit.json", "fewbit.scales"):
        (foreign / name).unlink()
    adapter = shutil.copytree(place / "adapter-awq", tmp_path / "adapter")
    (adapter / "fewbit.json").unlink()
    models.edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(foreign))
    with pytest.warns(UserWarning, match=f"{foreign} does not record its AWQ scales") as seen:
        adapted(place / "unfolded", adapter)
    assert [Path(each.filename).name for each in seen if "AWQ" in str(each.message)] == ["peft_model.py"]  # the caller
    adapted(foreign, adapter)  # this very model: nothing to say
    models.edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "x" / ".." / "foreign"))
    (tmp_path / "x").mkdir()
    adapted(foreign, adapter)


def test_a_gguf_file_carries_its_scales(place: Path, text: Path, tmp_path: Path) -> None:
    plan = find("q4_0").changed(method="awq")
    quantize.quantize(place / "model", tmp_path / "model.gguf", plan=plan, calibration=str(text))
    model = package.load(tmp_path / "model.gguf")
    found = scales.of_model(model)
    assert found
    assert found.origin == str(place / "model")
    assert (folded(locate(tmp_path / "model.gguf")) or scales.Scales()).digest == found.digest


@pytest.mark.parametrize("several", [False, True])
def test_a_folder_names_its_only_file(several: bool, place: Path, tmp_path: Path, text: Path) -> None:
    """An adapter of a GGUF file without a record of its scales, such as one that transformers alone has trained."""
    plan, files = Plan("p", "gguf", (Rule("*", "q8_0", "awq"),)), tmp_path / "files"
    files.mkdir()
    quantize.quantize(place / "model", files / "a.gguf", plan=plan, calibration=str(text))
    shutil.copytree(place / "model", tmp_path / "other")
    unfolded(place / "model", package.load(files)).save_pretrained(tmp_path / "other")
    shutil.copytree(place / "adapter-unfolded", tmp_path / "adapter")
    (tmp_path / "adapter" / "fewbit.json").unlink()
    models.edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(files))
    wanted = models.logits(package.load(files, adapter=tmp_path / "adapter"), IDS)
    if several:  # of which one is the adapter's model
        shutil.copyfile(files / "a.gguf", files / "b.gguf")
        with pytest.warns(UserWarning, match="files does not record its AWQ scales"):
            package.load(tmp_path / "other", adapter=tmp_path / "adapter")
        return
    assert apart(models.logits(package.load(tmp_path / "other", adapter=tmp_path / "adapter"), IDS), wanted) < EXACT
