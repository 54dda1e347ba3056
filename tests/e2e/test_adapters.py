"""Fine-tuning learns, says what is wrong before it begins, and spoils nothing; merging keeps what was learned."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fewbit as package
from fewbit import NumericsError, PlanError
from fewbit.api import quantize
from fewbit.errors import FormatError
from fewbit.models import merge as merging
from fewbit.models.adapters import train as training
from fewbit.models.adapters.attach import quiet
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.source import locate
from fewbit.pipeline.job import rehearsed
from fewbit.plans.plan import find
from fewbit.report import text as report_text
from fewbit.system import publish
from tests import architectures, models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_bad_input import check

QUICK = ("--length", 32, "--batch", 8, "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("adapters") / "model", "llama", chat=models.CHAT, dtype="float32")


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    out = model.parent / "quantized"
    quantize.quantize(model, out, plan="rtn-4bit")
    return out


@pytest.fixture(scope="module")
def adapter(quantized: Path, text: Path) -> Path:
    out = quantized.parent / "adapter"
    tuning = Tuning(length=32, batch=8, learning_rate=0.01, epochs=2)
    done = package.finetune(quantized, out, data=str(text), tuning=tuning)
    assert done.held_out_before is not None
    assert done.held_out_after is not None
    assert done.held_out_after < 0.75 * done.held_out_before
    return out


def written(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8"
    )
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out"


# --- finetune ---


def test_it_learns_and_tells_what_it_did(
    quantized: Path, text: Path, fewbit: Fewbit, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = fewbit("finetune", quantized, "--data", text, "-o", place, "--steps", 20, *QUICK, "--json")
    assert answer.code == 0, answer.err
    told = answer.json
    assert told["steps"] == 20
    assert told["held_out_after"] < 0.9 * told["held_out_before"]
    assert told["trainable"] == 14848 == sum(t.numel() for t in load_file(place / "adapter_model.safetensors").values())
    assert "step 20/20" in answer.err
    config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, str(quantized))
    assert [p.name for p in place.parent.iterdir()] == ["out"]
    shown = fewbit("finetune", quantized, "--data", text, "-o", place, "--steps", 1, *QUICK, "--overwrite")
    assert shown.code == 0
    assert "held out, after" in shown.out


def test_others_can_read_the_adapter_as_its_other_files(adapter: Path) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in adapter.iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"] == adapter.stat().st_mode & 0o666


def test_the_losses_it_tells_are_those_of_the_files(quantized: Path, text: Path, place: Path) -> None:
    tuning = Tuning(length=32, batch=3, steps=3, learning_rate=0.01, held_out=0.2)
    done = package.finetune(quantized, place, data=str(text), tuning=tuning)
    from fewbit.texts.examples import examples, split
    from fewbit.texts.sources import load_text

    every, _ = examples(load_text(str(text)), models.tokenizer(models.CHAT), 32)
    _, held_out = split(every, 0.2, 0)
    losses = []
    for loaded in (package.load(quantized), package.load(quantized, adapter=place)):
        loss = [models.logits(loaded, torch.tensor([e.ids]))[0, :-1].log_softmax(-1) for e in held_out]
        nats = [-row.gather(1, torch.tensor(e.ids[1:])[:, None]) for row, e in zip(loss, held_out, strict=True)]
        losses.append(float(torch.cat(nats).mean()))
    assert losses == pytest.approx([done.held_out_before, done.held_out_after], rel=1e-5)


@pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
@pytest.mark.parametrize("kind", ["llama4_text", "mamba2", "nemotron_h"])
def test_all_linears_that_take_a_lora_are_trained(kind: str, text: Path, tmp_path: Path) -> None:
    model = architectures.save(tmp_path / "model", kind)
    package.finetune(model, tmp_path / "out", data=str(text), tuning=Tuning(steps=1, length=16, batch=1))
    leaves = {key.rsplit(".", 3)[1] for key in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    wanted = {"llama4_text": {"q_proj", "down_proj"}, "mamba2": {"in_proj"}, "nemotron_h": {"in_proj", "q_proj"}}
    assert wanted[kind] <= leaves
    assert not leaves & {"router", "out_proj"}


def test_of_chats_only_answers_are_learned(model: Path, fewbit: Fewbit, tmp_path: Path, place: Path) -> None:
    """All questions differ, all answers are one: it is known after few steps, and no question is."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": models.sentences(1, i)},
                {"role": "assistant", "content": "The block."},
            ]
        }
        for i in range(24)
    ]
    data = written(tmp_path / "chats.jsonl", *lines)
    done = fewbit("finetune", model, "--data", data, "-o", place, *QUICK, "--epochs", 16, "--length", 128, "--json")
    assert done.code == 0, done.err
    assert done.json["held_out_after"] < 0.5 < 2 < done.json["held_out_before"]
    answer = fewbit("generate", model, "A new word.", "--chat", "--adapter", place, "--max-new-tokens", 12, "--json")
    assert answer.json["text"].startswith("The block.")


@pytest.mark.parametrize("flags", [("--targets", "q_proj,down_proj"), ("--dropout", "0.1"), ("--no-checkpointing",)])
def test_options_reach_the_training(
    flags: tuple[str, ...], quantized: Path, text: Path, fewbit: Fewbit, place: Path
) -> None:
    short = ("--data", text, "-o", place, "--steps", 2, "--accumulate", 2, *QUICK, "--held-out", 0, *flags)
    answer = fewbit("finetune", quantized, *short, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["held_out_after"] is None
    config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    if "--targets" in flags:
        assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert config["lora_dropout"] == (0.1 if "--dropout" in flags else 0)


def test_checkpointing_and_the_seed_decide_nothing_else(quantized: Path, text: Path, tmp_path: Path) -> None:
    def weights(name: str, **changes: Any) -> Any:
        tuning = Tuning(length=32, batch=4, steps=3, held_out=0, learning_rate=0.01, **changes)
        package.finetune(quantized, tmp_path / name, data=str(text), tuning=tuning)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    first, same, other = weights("a"), weights("b", checkpointing=False), weights("c", seed=1)
    for name, tensor in first.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-5, atol=1e-7)
    assert not all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_more_visible_gpus_change_nothing(
    quantized: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would give each of them a batch in each step."""
    tuning, losses = Tuning(length=32, batch=2, steps=3, learning_rate=0.01), []
    for visible in (0, 2):
        monkeypatch.setattr(TrainingArguments, "n_gpu", visible)
        done = package.finetune(quantized, tmp_path / f"of-{visible}", data=str(text), tuning=tuning)
        losses.append((done.loss, done.held_out_after))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_loss_that_is_not_finite_keeps_the_last_good_adapter(
    steps_before: int, quantized: Path, text: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that leads to the bad loss is undone: its adapter is what is bad."""
    kept: list[dict[str, Any]] = []

    def poisoned(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
        kept.append({n: p.detach().clone() for n, p in adapter.items()})
        if len(kept) == steps_before + 2:
            with torch.no_grad():
                for parameter in adapter.values():
                    parameter.fill_(float("nan"))
        return Trainer.compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "compute_loss", poisoned, raising=False)
    with pytest.raises(NumericsError, match=f"the loss is nan in step {steps_before + 2} of 20") as refusal:
        package.finetune(quantized, place, data=str(text), tuning=Tuning(length=32, steps=20, learning_rate=0.01))
    assert "learning_rate" in refusal.value.hint
    if not steps_before:
        assert not list(place.parent.iterdir())
        return
    assert f"as of step {steps_before}" in refusal.value.message
    saved = load_file(place / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in saved.values())
    for name, tensor in kept[steps_before].items():
        assert torch.equal(saved[name.replace(".default", "")], tensor)


def test_a_learning_rate_that_is_too_high_is_told(quantized: Path, text: Path, place: Path, fewbit: Fewbit) -> None:
    flags = ("--learning-rate", "1e30", "--steps", 8, "--length", 32)
    check(fewbit("finetune", quantized, "--data", text, "-o", place, *flags), 4, "in step", "learning-rate")
    assert not list(place.parent.iterdir())


def test_an_interruption_leaves_nothing(
    quantized: Path, text: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training._Watcher, "on_step_end", stop)
    answer = fewbit("finetune", quantized, "--data", text, "-o", place, *QUICK)
    assert answer.code == 130
    assert "interrupted" in answer.err
    assert not list(place.parent.iterdir())


GOOD = {"prompt": "The", "completion": " block."}


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ((), 2, ("empty",)),
        (("", ""), 2, ("empty",)),
        ((GOOD, "{", GOOD), 3, ("line 2", "JSON")),
        ((GOOD, {"prompt": "The"}), 3, ("line 2",)),
        ((GOOD, {"prompt": 3, "completion": "x"}), 3, ("line 2", "prompt")),
        ((GOOD, {"messages": []}), 3, ("line 2", "messages")),
        ((GOOD, GOOD, {"messages": [{"role": "user"}]}), 3, ("line 3",)),
        (({"messages": [{"role": "user", "content": "x"}]},), 2, ("nothing to learn",)),
        ((GOOD,), 2, ("--held-out 0",)),
    ],
    ids=str,
)
def test_broken_data_is_told_before_the_model_is_loaded(
    lines: tuple[Any, ...],
    code: int,
    words: tuple[str, ...],
    quantized: Path,
    tmp_path: Path,
    place: Path,
    fewbit: Fewbit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fewbit.models.load.load_model", None)
    data = written(tmp_path / "data.jsonl", *lines)
    named = () if "--held-out 0" in words else (str(data),)
    check(fewbit("finetune", quantized, "--data", data, "-o", place), code, *named, *words)
    assert not list(place.parent.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        ("--rank", "0"),
        ("--rank", "65"),
        ("--batch", "0"),
        ("--steps", "0"),
        ("--alpha", "-1"),
        ("--learning-rate", "nan"),
        ("--dropout", "1"),
        ("--held-out", "1"),
        ("--length", "1"),
        ("--length", "129"),
        ("--targets", "no_such_proj"),
        ("--targets", "q_proj,v_prj"),
        ("--device", "gpu7"),
    ],
    ids=" ".join,
)
def test_a_training_that_cannot_be(
    flags: tuple[str, str], quantized: Path, text: Path, place: Path, fewbit: Fewbit
) -> None:
    named = flags[0].removeprefix("--"), flags[1].rpartition(",")[2]
    check(fewbit("finetune", quantized, "--data", text, "-o", place, *flags), 2, *named)
    assert not list(place.parent.iterdir())


def test_an_output_that_is_in_the_way(
    model: Path, text: Path, place: Path, quantized: Path, adapter: Path, fewbit: Fewbit
) -> None:
    check(fewbit("finetune", model, "--data", "absent.txt", "-o", place), 2, "absent.txt")
    place.mkdir()
    (place / "notes.txt").touch()
    check(fewbit("finetune", model, "--data", text, "-o", place), 2, str(place), "--overwrite")
    (place / "notes.txt").unlink()
    check(fewbit("finetune", model, "--data", text, "-o", model, "--overwrite"), 2, str(model), "lost")
    check(fewbit("merge", model, place, "-o", place, "--overwrite"), 3, str(place), "adapter_config.json")
    check(fewbit("merge", quantized, adapter, "-o", adapter, "--overwrite"), 2, str(adapter), "lost")


def test_without_peft_it_says_what_to_install(
    model: Path, text: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    check(fewbit("finetune", model, "--data", text, "-o", place), 2, "peft", "pip install 'fewbit[finetune]'")
    check(fewbit("generate", model, "The", "--adapter", place), 2, "peft", "pip install 'fewbit[finetune]'")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    check(fewbit("merge", model, place, "-o", place), 2, "peft 0.17.1 is too old")


# --- experts ---


@pytest.mark.parametrize("kind", ["gpt_oss", "lfm2_moe", "mixtral", "qwen3_moe"])
def test_an_adapter_of_experts_is_merged(kind: str, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "original", kind)
    package.quantize(folder, tmp_path / "nf4", plan="nf4", device="cpu")
    tuning = Tuning(rank=2, steps=2, length=32, learning_rate=0.01, held_out=0.0)
    package.finetune(tmp_path / "nf4", tmp_path / "adapter", data=[models.sentences(40)], tuning=tuning)
    assert any("experts.0." in name for name in models.tensors_of(tmp_path / "adapter"))
    package.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged", text=[models.sentences(60)], samples=1)
    assert models.tensors_of(tmp_path / "merged").keys() == models.tensors_of(folder).keys()
    merged, original = models.original(tmp_path / "merged"), models.original(folder)
    ids = torch.randint(3, models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    with_adapter = package.load(folder, adapter=tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(models.logits(merged, ids), models.logits(with_adapter, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(models.logits(merged, ids), models.logits(original, ids), atol=1e-2)


def test_a_packed_model_of_experts_is_merged_under_its_names(tmp_path: Path) -> None:
    """Without its original, the unpacked model is what the adapter is added to. It was loaded with separate experts."""
    folder = architectures.save(tmp_path / "original", "mixtral")
    package.quantize(folder, tmp_path / "nf4", plan="nf4", device="cpu")
    tuning = Tuning(rank=2, steps=1, length=32, held_out=0.0)
    package.finetune(tmp_path / "nf4", tmp_path / "adapter", data=[models.sentences(40)], tuning=tuning)
    names = models.tensors_of(folder).keys()
    shutil.rmtree(folder)
    package.merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged", text=[models.sentences(60)], samples=1)
    assert models.tensors_of(tmp_path / "merged").keys() == names


def test_an_adapter_that_lacks_a_weight_is_refused(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    tensors = models.tensors_of(adapter)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="Found missing adapter keys"):
        package.load(quantized, adapter=tmp_path / "adapter")


# --- an adapter in use ---


def test_evaluate_and_generate_take_an_adapter(quantized: Path, adapter: Path, text: Path, fewbit: Fewbit) -> None:
    flags = ("--text", text, "--length", 32, "--samples", 8, "--json")
    told = fewbit("evaluate", quantized, "--adapter", adapter, "--reference", quantized, *flags).json
    assert told["perplexity"] < 0.4 * told["reference_perplexity"]
    same = ("--reference", quantized, "--reference-adapter", adapter)
    assert fewbit("evaluate", quantized, "--adapter", adapter, *same, *flags).json["kl"]["max"] == 0
    plain, tuned = (
        fewbit("generate", quantized, "The", *more, "--json").json["text"] for more in ((), ("--adapter", adapter))
    )
    assert plain != tuned


def test_an_adapter_for_another_model_names_what_differs(
    adapter: Path, tmp_path: Path, fewbit: Fewbit, place: Path
) -> None:
    wider = models.save(tmp_path / "wider", "llama", intermediate_size=128)
    other = models.save(tmp_path / "other", "gpt-neox")
    for command in (("generate", wider, "The", "--adapter", adapter), ("merge", wider, adapter, "-o", place)):
        words = ("layers.0.mlp.down_proj.lora_A.weight [8, 96]", "[64, 128]", "another model")
        check(fewbit(*command), 2, *words)
    answer = fewbit("evaluate", other, "--adapter", adapter, "--length", 32)
    check(answer, 2, "the model has no model.layers.0.mlp.down_proj", "and 20 more")
    assert not list(place.parent.iterdir())


@pytest.mark.parametrize("broken", ["absent", "config", "no object", "weights", "truncated"])
def test_an_adapter_that_is_none(
    broken: str, quantized: Path, adapter: Path, tmp_path: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found before a model is loaded."""

    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("the model is loaded")

    folder = tmp_path / "broken"
    if broken != "absent":
        shutil.copytree(adapter, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if broken == "config":
        config.write_text("{", encoding="utf-8")
    elif broken == "no object":
        config.write_text("[]", encoding="utf-8")
    elif broken == "weights":
        weights.unlink()
    elif broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    code = 2 if broken == "absent" else 3
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", work)
    check(fewbit("generate", quantized, "The", "--adapter", folder), code, str(folder))
    check(fewbit("merge", quantized, folder, "-o", tmp_path / "out", "--length", 32), code, str(folder))
    for flags in (("--adapter", folder), ("--reference", quantized, "--reference-adapter", folder)):
        check(fewbit("evaluate", quantized, "--length", 32, *flags), code, str(folder))


def test_an_adapter_for_no_reference_is_refused(quantized: Path, adapter: Path, fewbit: Fewbit) -> None:
    answer = fewbit("evaluate", quantized, "--length", 32, "--reference-adapter", adapter)
    check(answer, 2, "--reference-adapter without --reference", "Give --reference too.")


# --- merge ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_merging_into_the_values_equals_the_adapter_on_codes(
    family: str, text: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    model = models.save(tmp_path / "model", family, dtype="float32")
    quantize.quantize(model, tmp_path / "quantized", plan="rtn-4bit")
    shutil.rmtree(model)  # so that the base is not at hand
    tuning = Tuning(length=32, batch=8, learning_rate=0.01, steps=4, held_out=0)
    package.finetune(tmp_path / "quantized", tmp_path / "adapter", data=str(text), tuning=tuning)
    flags = ("--text", text, "--length", 32)
    answer = fewbit("merge", tmp_path / "quantized", tmp_path / "adapter", "-o", tmp_path / "out", *flags, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["base"] is None
    assert answer.json["evaluation"]["kl"]["max"] < 1e-6
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    ids = torch.arange(3, 35).unsqueeze(0)
    wanted = models.logits(package.load(tmp_path / "quantized", adapter=tmp_path / "adapter"), ids)
    torch.testing.assert_close(models.logits(models.original(tmp_path / "out"), ids), wanted, rtol=1e-4, atol=1e-4)


def test_merged_into_the_base_it_is_peft_merged(
    model: Path, quantized: Path, adapter: Path, tmp_path: Path, fewbit: Fewbit
) -> None:
    with quiet():
        wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    for more in ((), ("--base", model)):
        out = tmp_path / f"out{len(more)}"
        answer = fewbit("merge", quantized, adapter, "-o", out, "--length", 32, *more)
        assert answer.code == 0, answer.err
        assert f"added to {model}" in " ".join(answer.out.split())  # a long path begins a line of its own
        assert "KL divergence" in answer.out
        assert {file.name for file in out.iterdir()} == {file.name for file in model.iterdir()}
        found = models.tensors_of(out)
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.state_dict().items() if name in found)
    plain = fewbit("merge", model, adapter, "-o", tmp_path / "plain", "--length", 32, "--json").json
    assert plain["base"] == str(model)
    assert plain["evaluation"]["kl"]["max"] < 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_a_merge_carries_over_what_has_no_place(packed: bool, tmp_path: Path, adapter: Path, model: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    (source / "README.md").write_text("# The original", encoding="utf-8")
    extra = {"mtp.fc.weight": torch.rand(4, 4), "model.layers.9.mlp.up_proj.weight": torch.rand(4, 4)}
    save_file({**models.tensors_of(source), **extra}, source / "model.safetensors", metadata={"format": "pt"})
    for name in ("draft/model.safetensors", "1_Pooling/config.json"):
        (source / name).parent.mkdir()
        (source / name).write_text("{}", encoding="utf-8")
    if packed:
        quantize.quantize(source, tmp_path / "packed", plan="rtn-4bit")
        shutil.rmtree(source)  # so that the base is not at hand
        source = tmp_path / "packed"
    done = package.merge(source, adapter, tmp_path / "out", length=32)
    found = models.tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())
    assert not any("qweight" in name for name in found)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    assert "carried over as is: 2 tensors of 128 bytes" in done.notes[0]
    assert (tmp_path / "out" / "README-original.md").read_text(encoding="utf-8") == "# The original"
    assert packed or "draft/" in done.notes[1]


MERGING = ["adding", "block", "writing", "checking", "window"]  # first words of the lines; slow work has more lines


def test_merged_and_quantized_again(quantized: Path, adapter: Path, text: Path, place: Path, fewbit: Fewbit) -> None:
    flags = ("--plan", "rtn-4bit", "--text", text, "--length", 32, "--json")
    answer = fewbit("merge", quantized, adapter, "-o", place, *flags)
    assert answer.code == 0, answer.err
    assert [*dict.fromkeys(line.split()[0] for line in answer.err.splitlines())] == MERGING
    assert 0 < answer.json["evaluation"]["kl"]["mean"] < 0.1
    assert answer.json["evaluation"]["perplexity"] < 0.4 * fewbit("evaluate", quantized, *flags[2:]).json["perplexity"]
    assert [p.name for p in place.parent.iterdir()] == ["out"]
    made = json.loads((place / "fewbit.json").read_text(encoding="utf-8"))["model"]
    assert made.endswith(f" with {adapter}")
    assert fewbit("inspect", place, "--json").json["schemes"] == {"int4-g32-sym": 14}


def test_verbs_show_progress_in_a_terminal_only(
    quantized: Path,
    adapter: Path,
    text: Path,
    place: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A merge runs two other verbs, whose progress is shown with its own."""

    def merge(**progress: Any) -> None:
        package.merge(quantized, adapter, place, plan="rtn-4bit", text=str(text), length=32, overwrite=True, **progress)

    caplog.set_level(logging.INFO, "fewbit.progress")
    merge()
    assert not capfd.readouterr().err
    said = [record.message for record in caplog.records if record.name == "fewbit.progress"]
    assert [*dict.fromkeys(line.split()[0] for line in said)] == MERGING
    caplog.clear()
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(report_text, "err", Console(file=terminal, width=120, force_terminal=True, _environ={}))
    merge()
    assert all(part in terminal.getvalue() for part in ("adding", "2/2", "writing", "8/8"))
    shown = terminal.getvalue()
    merge(progress=False)
    steps = list[Any]()
    merge(progress=steps.append)
    assert [step.done for step in steps] == [1, 2]
    assert terminal.getvalue() == shown
    assert "fewbit.progress" not in {record.name for record in caplog.records}


def test_a_merge_that_cannot_be(
    model: Path, quantized: Path, adapter: Path, tmp_path: Path, place: Path, fewbit: Fewbit
) -> None:
    check(
        fewbit("merge", quantized, adapter, "-o", place, "--base", quantized),
        2,
        str(quantized),
        "is the quantized model itself",
    )
    check(fewbit("merge", quantized, adapter, "-o", place, "--plan", "gptq-5bit"), 2, "gptq-5bit")
    tensors = load_file(adapter / "adapter_model.safetensors")
    broken = shutil.copytree(adapter, tmp_path / "broken")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    check(fewbit("merge", quantized, broken, "-o", place), 4, str(broken))
    assert not list(place.parent.iterdir())


@pytest.mark.parametrize("kind", ["with its base", "alone", "gguf"])
def test_a_merge_checks_its_plan_before_its_work(
    kind: str, quantized: Path, adapter: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(merging, "write_merged", work)
    source, place = quantized, tmp_path / "out"
    if kind == "alone":
        source = shutil.copytree(quantized, tmp_path / "alone")
        models.edit_json(source / "fewbit.json", origin=None)
    elif kind == "gguf":
        source = tmp_path / "model.gguf"
        quantize.quantize(quantized.parent / "model", source, plan="q8_0")
    few = {"name": "few", "format": "gptq", "rules": [{"match": "*.q_proj", "scheme": "int4-g32-sym", "method": "rtn"}]}
    measured: dict[str, Any] = {"text": str(text), "length": 32}
    short = tmp_path / "short.txt"
    short.write_text("The cat sat.", encoding="utf-8")
    for words, wanted in (
        (r"only \d+% of the parameters", {"plan": few}),
        ("too few for one window", {"plan": "gptq-4bit", "calibration": str(short)}),
        ("absent.txt", {"plan": "gptq-4bit", "calibration": "absent.txt"}),
        ("is not available", {"device": "cuda:99"}),
    ):
        with pytest.raises(PlanError, match=words):
            package.merge(source, adapter, place, **measured, **wanted)
    with pytest.raises(PlanError, match="would be a GGUF file"):
        package.merge(source, adapter, tmp_path / "out.gguf", plan="rtn-4bit", **measured)
    with pytest.raises(AssertionError, match="the work has begun"):
        package.merge(source, adapter, place, plan="rtn-4bit", **measured)
    assert not place.exists()


def test_a_merge_needs_room_for_all_that_it_writes(
    quantized: Path, adapter: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the output: the merged weights in 16 bits, and the quantized blocks until the output is made."""
    found: dict[Path, int] = {}

    def stop(needed: dict[Path, int]) -> None:
        found.update(needed)
        raise PlanError("no room")

    monkeypatch.setattr(publish, "check_space", stop)
    with pytest.raises(PlanError, match="no room"):
        package.merge(quantized, adapter, tmp_path / "out", plan="rtn-4bit", text=str(text), length=32)
    size, cached = found.pop((tmp_path / "out").resolve()), found.popitem()[1]
    parameters = sum(tensor.numel() for tensor in models.tensors_of(quantized.parent / "model").values())
    assert cached == 2 * parameters + size


def test_a_merge_is_rehearsed_with_its_own_tokenizer(quantized: Path) -> None:
    with rehearsed(locate(quantized), find("q8_0"), "cpu") as job:
        assert (job.source.folder / "tokenizer.json").read_bytes() == (quantized / "tokenizer.json").read_bytes()


def test_a_merge_checks_the_base_before_its_work(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    other = models.save(tmp_path / "other", "llama", vocab_size=512)
    with pytest.raises(PlanError, match=r"the vocabulary of .* has 512 entries, and that of"):
        package.merge(quantized, adapter, tmp_path / "out", base=other)


def test_the_verbs_refuse_as_the_commands_do(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="exists"):
        package.merge(quantized, adapter, quantized)
