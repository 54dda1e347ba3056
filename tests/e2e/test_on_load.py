"""Quantizing in `from_pretrained`: what is made, shown and left behind, and what goes wrong in which words."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, BitsAndBytesConfig, GPTQConfig
from transformers.utils import logging as hf_logging

from fewbit.api import generate, inspect, quantize
from fewbit.errors import FewbitError, KernelError, PlanError
from fewbit.models.plugin import quantizer
from fewbit.nn.layers import QLinear
from fewbit.pipeline import blocks
from fewbit.pipeline import run as pipeline_run
from tests import architectures, models

TEXTS: dict[str, Any] = {"dataset": [models.sentences(20)], "group_size": 32}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def config_of(kind: str) -> Any:
    if kind in ("gptq", "awq"):
        return GPTQConfig(bits=4, **TEXTS) if kind == "gptq" else AwqConfig(**TEXTS)
    return BitsAndBytesConfig(load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4")


def loaded(folder: Path, kind: str, **options: Any) -> Any:
    with quantizer.serving():
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config_of(kind), **options).eval()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_it_is_closer_than_rounding_and_what_it_saves_is_it(kind: str, sound: Path, tmp_path: Path) -> None:
    made = loaded(sound, kind, device_map="auto")
    made.save_pretrained(tmp_path / "out")
    assert inspect.inspect(tmp_path / "out").schemes == {"int4-g32-sym" if kind == "gptq" else "int4-g32": 14}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(sound)(models.sentences(4, seed=9), return_tensors="pt")["input_ids"][:, :96]
    assert torch.equal(models.logits(again, words), models.logits(made, words))
    quantize.quantize(sound, tmp_path / "rtn", plan="rtn-4bit" if kind == "gptq" else _rounding(tmp_path))
    wanted = models.logits(models.original(sound), words)
    nearest = models.logits(generate.load(tmp_path / "rtn"), words)
    most = {"gptq": 0.85, "awq": 0.95}[kind]  # columns of a random model hardly differ, which leaves AWQ little to do
    assert (models.logits(made, words) - wanted).norm() < most * (nearest - wanted).norm()


def _rounding(folder: Path) -> str:
    plan = folder / "plan.json"
    plan.write_text(
        '{"name": "mine", "format": "awq", "rules": [{"match": "*", "scheme": "int4-g32"}]}', encoding="utf-8"
    )
    return str(plan)


def test_progress_is_shown_unless_transformers_shows_none(sound: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert hf_logging.is_progress_bar_enabled()
    loaded(sound, "gptq")
    assert "block 2/2" in capfd.readouterr().err
    hf_logging.disable_progress_bar()
    try:
        loaded(sound, "gptq")
        assert "block" not in capfd.readouterr().err
    finally:
        hf_logging.enable_progress_bar()


def test_a_run_that_was_killed_goes_on_and_nothing_stays_behind(
    sound: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def until_the_second(run: pipeline_run.Run, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(run, index, *rest)

    save = pipeline_run.Run.save
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_run.Run, "save", until_the_second)
        with pytest.raises(KeyboardInterrupt):
            loaded(sound, "gptq")
    made = loaded(sound, "gptq")
    assert "block 1/2  found, from an interrupted run" in capfd.readouterr().err
    assert [entry.name for entry in own_cache.iterdir() if "on-load" in entry.name] == []
    assert not list((own_cache / "runs").iterdir())
    words = torch.arange(40)[None]
    assert torch.equal(models.logits(made, words), models.logits(loaded(sound, "gptq"), words))


@pytest.mark.parametrize("kind", ["gptq", "awq", "nf4", "int8"])
def test_a_pickle_is_read_as_tensors_only(kind: str, sound: Path, model: Path) -> None:
    torch.save(models.tensors_of(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    words = torch.arange(40)[None]
    assert torch.equal(models.logits(loaded(model, kind), words), models.logits(loaded(sound, kind), words))


@pytest.mark.parametrize("kind", ["gptq", "awq", "nf4", "int8"])
def test_so_is_a_pickle_that_is_quantized(kind: str, sound: Path, tmp_path: Path) -> None:
    made = loaded(sound, kind)
    made.save_pretrained(tmp_path / "out")
    torch.save(models.tensors_of(tmp_path / "out"), tmp_path / "out" / "pytorch_model.bin")
    (tmp_path / "out" / "model.safetensors").unlink()
    with quantizer.serving():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, QLinear) for module in again.modules()) == 14
    words = torch.arange(40)[None]
    assert torch.equal(models.logits(again, words), models.logits(made, words))


# --- What is wrong is said as elsewhere, and not in transformers' words ---


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda weight: weight.fill_(float("nan")), "NaN"), (lambda weight: weight[:32].clone(), "shape")],
    ids=["NaN", "shape"],
)
@pytest.mark.parametrize("kind", ["gptq", "awq", "nf4", "int8"])
def test_a_weight_that_cannot_be_quantized(kind: str, change: Any, words: str, model: Path) -> None:
    tensors = models.tensors_of(model)
    tensors[f"{UP}.weight"] = change(tensors[f"{UP}.weight"])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FewbitError, match=words) as refusal:
        loaded(model, kind)
    assert UP in refusal.value.message


def test_no_tokenizer(model: Path, own_cache: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match="GPTQConfig needs a tokenizer") as refusal:
        loaded(model, "gptq")
    assert "tokenizer=tokenizer" in refusal.value.hint
    del refusal
    assert not list(own_cache.glob("runs/*"))


def test_what_is_quantized_already_is_not_quantized_again(sound: Path, tmp_path: Path) -> None:
    quantize.quantize(sound, tmp_path / "out", plan="rtn-4bit")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        made = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=GPTQConfig(bits=3, dataset=["never read"])
        )
    assert {str(m.codec) for m in made.modules() if isinstance(m, QLinear)} == {"int4-g32-sym"}
    with pytest.warns(UserWarning, match="already has"), pytest.raises(PlanError, match="names a kernel of gptqmodel"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=GPTQConfig(bits=4, backend="marlin"))


def test_what_stays_in_16_bits_is_said(tmp_path: Path) -> None:
    """DeepSeek-V4 has a linear that multiplies groups of columns."""
    folder = architectures.save(tmp_path / "m", "deepseek_v4")
    wanted = BitsAndBytesConfig(load_in_4bit=True)
    with (
        quantizer.serving(),
        pytest.warns(UserWarning, match=r"parameters, \d+% of those in the model's layers, stay in"),
    ):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted)


@pytest.mark.filterwarnings("ignore:BitsAndBytesConfig.*stay in")  # convolutions, a large part of a tiny model
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_next", "falcon"])
def test_a_config_quantizes_what_the_plan_does(tmp_path: Path, kind: str) -> None:
    """Experts, too, and linears of Falcon's own class. Saved and loaded again, all is as before."""
    folder = architectures.save(tmp_path / "m", kind)
    quantize.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")
    expected = generate.load(tmp_path / "out", dtype=torch.float32)
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with quantizer.serving():
        made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.float32)
    made.save_pretrained(tmp_path / "saved")
    again = generate.load(tmp_path / "saved", dtype=torch.float32)
    names = {name for name, module in expected.named_modules() if isinstance(module, QLinear)}
    assert names
    for model in (made, again):
        own = {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}
        assert own.keys() == names
        for name, module in own.items():
            assert torch.equal(module.qtensor().dequantize(), expected.get_submodule(name).qtensor().dequantize()), name


def test_a_module_to_skip_that_is_not_there(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", "mistral")
    wanted = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "dwon_proj"])
    with quantizer.serving(), pytest.warns(UserWarning, match="the model has no module dwon_proj$"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted)


@pytest.mark.parametrize("kind", ["gptq", "awq", "nf4", "int8"])
@pytest.mark.parametrize("form", ["dict", "auto"])
def test_no_packed_layer_goes_to_the_disk(model: Path, tmp_path: Path, kind: str, form: str) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    auto = {"device_map": "auto", "max_memory": {"cpu": "30KB"}}
    asked: dict[str, Any] = {"device_map": places} if form == "dict" else auto
    folder = tmp_path / "quantized"
    loaded(model, kind).save_pretrained(folder)
    with pytest.raises(KernelError, match="packed weights cannot be offloaded"):
        loaded(model, kind, offload_folder=tmp_path, **asked)
    with pytest.raises(KernelError, match="packed weights cannot be offloaded"), quantizer.serving():
        AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path, **asked)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_8_bit_floats_are_quantized(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = models.tensors_of(model)
    narrow = {name: t.to(dtype) if "_proj" in name else t for name, t in tensors.items()}
    save_file(narrow, model / "model.safetensors", {"format": "pt"})
    quantize.quantize(model, tmp_path / "q", plan="nf4")
    wide = {name: t.float() for name, t in narrow.items()}
    save_file(wide, model / "model.safetensors", {"format": "pt"})
    quantize.quantize(model, tmp_path / "w", plan="nf4")
    for name, tensor in models.tensors_of(tmp_path / "q").items():
        assert torch.equal(tensor, models.tensors_of(tmp_path / "w")[name]), name


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_what_transformers_reads_is_quantized(model: Path, tmp_path: Path, kind: str) -> None:
    """Another variant, a pickle or fewer layers than the folder alone would mean."""
    plain = Path(shutil.copytree(model, tmp_path / "plain"))
    wanted = loaded(plain, kind).state_dict()
    tensors = models.tensors_of(model)
    decoy = {name: tensor + 0.25 for name, tensor in tensors.items()}
    (model / "model.safetensors").rename(model / "model.fp16.safetensors")
    torch.save(tensors, model / "pytorch_model.bin")
    save_file(decoy, model / "model.safetensors", {"format": "pt"})
    for options in ({"variant": "fp16"}, {"use_safetensors": False}):
        found = loaded(model, kind, **options).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), options
    config = transformers.AutoConfig.from_pretrained(plain)
    config.num_hidden_layers = 1
    short = loaded(plain, kind, config=config)
    assert sum(isinstance(module, QLinear) for module in short.modules()) == 7
    shutil.copytree(plain, tmp_path / "parts" / "inner")
    inner = loaded(tmp_path / "parts", kind, subfolder="inner").state_dict()
    assert all(torch.equal(inner[name], wanted[name]) for name in wanted)


def test_renamed_tensors_are_refused_first(model: Path) -> None:
    tensors = {name.replace("model.", "text."): t for name, t in models.tensors_of(model).items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="with key_mapping"):
        loaded(model, "gptq", key_mapping={"^text\\.": "model."})
    assert isinstance(loaded(model, "nf4", key_mapping={"^text\\.": "model."}).get_submodule(UP), QLinear)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_room_is_checked_before_any_work(kind: str, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(blocks, "quantize_blocks", lambda *args, **kwargs: pytest.fail("work was done"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with (
        quantizer.serving(),
        pytest.raises(PlanError, match=r"(?s)of disk are needed for .*/on-load.*set FEWBIT_CACHE"),
    ):
        loaded(sound, kind)


def test_a_dataset_that_cannot_be_had_is_replaced(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = GPTQConfig(
        bits=4, dataset="c4", group_size=32, model_seqlen=16, tokenizer=AutoTokenizer.from_pretrained(sound)
    )
    with (
        quantizer.serving(),
        pytest.warns(UserWarning, match="on pydoc calibration .* connect to the Hub; or"),
    ):
        made = AutoModelForCausalLM.from_pretrained(sound, quantization_config=config)
    assert sum(isinstance(module, QLinear) for module in made.modules()) == 14
    monkeypatch.setenv("FEWBIT_STRICT_DATASET", "1")
    with quantizer.serving(), pytest.raises(PlanError, match=r"cannot load c4: HF_HUB_OFFLINE is set") as error:
        AutoModelForCausalLM.from_pretrained(sound, quantization_config=config)
    assert "pydoc" not in str(error.value)
    assert "dataset=[...]" in str(error.value)
    with quantizer.serving(), pytest.raises(PlanError, match=r"(?s)dataset='ptb': unknown.*'c4-new' or 'wikitext2'"):
        AutoModelForCausalLM.from_pretrained(sound, quantization_config=AwqConfig(bits=4, dataset="ptb"))


def test_reading_the_conversions_starts_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    made = quantizer.FewbitQuantizer(GPTQConfig(bits=4, dataset=["a text"]), pre_quantized=False)
    monkeypatch.setattr(made, "_make_checkpoint", lambda *_: pytest.fail("it quantizes"))
    made.waiting = (models.build("llama"), [], None)
    assert made.get_weight_conversions() == []
    assert made.waiting is not None
