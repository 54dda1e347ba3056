"""The command line does what it says, and its JSON is what scripts were promised."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from fewbit import __version__, registry
from fewbit.api import evaluate, quantize
from fewbit.api.generate import load
from fewbit.cli import app
from fewbit.plans import plan
from fewbit.schemes.base import parse
from fewbit.system import native
from tests import models
from tests.e2e.conftest import Fewbit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("cli") / "model", "llama", chat=models.CHAT)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    quantize.quantize(model, out, plan="rtn-4bit")
    return out


@pytest.fixture
def few(text: Path) -> tuple[object, ...]:
    """Flags that make calibration quick."""
    return ("--calibration", text, "--samples", 4, "--length", 32)


def test_version(fewbit: Fewbit) -> None:
    answer = fewbit("--version")
    assert (answer.code, answer.out, answer.err) == (0, f"{__version__}\n", "")


def flags(command: Any) -> set[str]:
    """Long names of the options that a command shows, `--no-...` included."""
    shown = [option for option in command.params if option.param_type_name == "option" and not option.hidden]
    return {flag for option in shown for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--")}


APP: Any = typer.main.get_command(app.app)
COMMANDS: dict[str, Any] = {"": APP, **{name: command for name, command in APP.commands.items() if not command.hidden}}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command: str, fewbit: Fewbit) -> None:
    answer = fewbit(*filter(None, [command]), "-h")
    assert answer.code == 0
    assert "Usage:" in answer.out
    wanted = flags(COMMANDS[command])
    assert wanted or command == "run"  # its options are those of the command that it runs
    assert wanted <= set(re.findall(r"--[a-z0-9-]+", answer.out))


def test_an_unknown_command_is_refused(fewbit: Fewbit) -> None:
    answer = fewbit("quantise")
    assert answer.code == 2
    assert "quantise" in answer.err


def test_list_names_everything_there_is(fewbit: Fewbit) -> None:
    shown, told = fewbit("list"), fewbit("list", "--json").json
    assert shown.code == 0
    for family in (*registry.FAMILIES, "plans"):
        names = plan.PRESETS if family == "plans" else registry.entries(family)
        assert [row["name"] for row in told[family]] == list(names)
        assert all(row["what"] for row in told[family])
        assert all(re.search(rf"\b{re.escape(name)}\b", shown.out) for name in names)
    gptq = next(row for row in told["methods"] if row["name"] == "gptq")
    assert all(flag in gptq["what"] for flag in ("--damp", "--act-order", "--clip-search", "--refine"))
    assert next(row for row in told["kernels"] if row["name"] == "reference")["unavailable"] is None


def test_list_says_what_no_format_stores(fewbit: Fewbit) -> None:
    (affine,) = (row for row in fewbit("list", "--json").json["schemes"] if row["name"] == "affine")
    formats = registry.entries("formats")
    for spec, names in affine["formats"].items():
        scheme = parse(spec)
        assert names == [name for name in formats if formats[name]().why_not((4096, 4096), scheme) is None]
    for row in fewbit("list", "--json").json["schemes"]:
        others = [spec for spec, names in row["formats"].items() if not names]
        note = f"No format stores these yet: {', '.join(others)}."
        assert (note in row["what"]) == (0 < len(others) < len(row["formats"]))
    assert all(row["formats"] for row in fewbit("list", "--json").json["schemes"])


def test_doctor_tells_what_there_is(fewbit: Fewbit) -> None:
    shown, told = fewbit("doctor"), fewbit("doctor", "--json").json
    assert shown.code == 0
    assert told["versions"]["fewbit"] == __version__
    assert {"torch", "transformers", "python"} <= told["versions"].keys()
    assert told["threads"] >= 1
    assert told["memory"] > 1 << 28
    assert told["kernels"]["reference"] is None
    assert __version__ in shown.out
    assert "reference" in shown.out


def test_a_dry_run_foresees_every_byte_and_writes_none(
    model: Path, few: tuple[object, ...], fewbit: Fewbit, tmp_path: Path, own_cache: Path
) -> None:
    (tmp_path / "outputs").mkdir()
    out = tmp_path / "outputs" / "out"
    before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
    shown = fewbit("quantize", model, "-o", out, "--dry-run", *few)
    told = fewbit("quantize", model, "--dry-run", "--json").json
    assert shown.code == 0
    assert not list((tmp_path / "outputs").iterdir())
    assert [p.name for p in own_cache.iterdir() if not p.is_symlink()] == []
    assert {file.name: file.stat().st_mtime_ns for file in model.iterdir()} == before

    done = fewbit("quantize", model, "-o", out, *few, "--json").json
    written = models.tensors_of(out)
    assert told["output_bytes"] == done["output_bytes"] == sum(t.nbytes for t in written.values())
    assert told["original_bytes"] == done["original_bytes"]
    assert told["share"] == done["share"] > 0.9
    assert told["unquantized"] == done["unquantized"]
    assert (
        sum(told["unquantized"].values())
        == sum(nbytes for _, what, nbytes in told["tensors"] if what.startswith("unquantized"))
        > 0
    )
    assert told["notes"] == done["notes"]
    assert f"{told['output_bytes']:,}" in shown.out
    assert "groups of 32 instead of 128" in shown.out
    quantized = {tensor["module"]: tensor for tensor in done["tensors"]}
    for name, what, nbytes in told["tensors"]:
        module = name.removesuffix(".weight")
        if module in quantized:
            parts = [t for key, t in written.items() if key.rpartition(".")[0] == module]
            assert what.startswith(quantized[module]["scheme"])
            assert nbytes == sum(t.nbytes for t in parts)
        else:
            assert what.startswith("unquantized")
            assert nbytes == written[name].nbytes
        assert f"{nbytes:,}" in shown.out
    assert {name.removesuffix(".weight") for name, *_ in told["tensors"]} >= quantized.keys()


def test_the_cache_names_the_model_of_each_entry(model: Path, text: Path, fewbit: Fewbit, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(models.tensors_of(model), pickled / "pytorch_model.bin")
    few = ("--calibration", text, "--samples", 2, "--length", 32)
    assert fewbit("inspect", pickled).code == 0
    assert fewbit("quantize", model, "--bits", 4.6, "--dry-run", *few).code == 0
    assert fewbit("compare", model, "--plans", "bf16,nf4", "-o", tmp_path / "report", *few[2:]).code == 0
    listed = [each for each in fewbit("cache", "--json").json["entries"] if "smollm2" not in each["path"]]
    assert {(each["kind"], each["model"], each["holds"]) for each in listed} == {
        ("models", str(pickled), "its pickle as safetensors"),
        ("costs", str(model), "loss of each weight at each width"),
        ("costs", str(model), "loss of one choice of widths"),
        ("comparisons", str(model), "output and measurements of bf16"),
        ("comparisons", str(model), "output and measurements of nf4"),
        ("comparisons", str(model), "speeds of plans"),
    }
    shown = " ".join(fewbit("cache").out.split())
    assert "loss of each weight at each width" in shown


@pytest.fixture
def bare(model: Path, tmp_path: Path) -> Path:
    """The model without its tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, folder)
    return folder


def test_a_dry_run_needs_the_tokenizer_that_the_run_needs(bare: Path, fewbit: Fewbit) -> None:
    for code, flags in (
        (3, ()),
        (3, ("--plan", "rtn-4bit", "--effort", "high")),
        (3, ("--plan", "q8_0")),
        (0, ("--plan", "rtn-4bit")),
    ):
        shown = fewbit("quantize", bare, "--dry-run", *flags)
        said = (
            "has no usable tokenizer" in shown.err
            if code
            else "has no tokenizer, and so" in " ".join(shown.out.split())
        )
        assert (shown.code, said) == (code, True), (flags, shown)


def test_what_computes_on_no_text_needs_no_tokenizer(model: Path, bare: Path, fewbit: Fewbit, tmp_path: Path) -> None:
    done = fewbit("quantize", bare, "-o", tmp_path / "out", "--plan", "rtn-4bit")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())  # lines are wrapped
    assert f"note: {bare} has no tokenizer, and so the output has none" in said
    assert "checked by a forward pass only, as there is no tokenizer" in said
    assert fewbit("quantize", model, "-o", tmp_path / "whole", "--plan", "rtn-4bit").code == 0
    one, other = (models.tensors_of(tmp_path / name) for name in ("out", "whole"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    assert fewbit("convert", tmp_path / "out", "-o", tmp_path / "dense", "--to", "dense").code == 0
    for flags in (
        ("--plan", "gptq-4bit"),
        ("--plan", "rtn-4bit", "--bits", 4.5),
        ("--plan", "rtn-4bit", "--effort", "high"),
    ):
        refused = fewbit("quantize", bare, "-o", tmp_path / "refused", *flags)
        assert (refused.code, "has no usable tokenizer" in refused.err) == (3, True), flags
    assert fewbit("quantize", bare, "-o", tmp_path / "refused.gguf", "--plan", "q8_0").code == 3


def test_flags_reach_the_method(model: Path, few: tuple[object, ...], fewbit: Fewbit, tmp_path: Path) -> None:
    flags = ("--no-act-order", "--damp", "0.05", "--refine=0", "--clip-search", "false")
    done = fewbit("quantize", model, "-o", tmp_path / "out", *few, *flags, "--json")
    assert done.code == 0
    record = json.loads((tmp_path / "out" / "fewbit.json").read_text(encoding="utf-8"))
    (rule,) = record["plan"]["rules"]
    assert rule["options"] == {"act_order": "false", "damp": "0.05", "refine": "0", "clip_search": "false"}
    assert rule["method"] == "gptq"
    plain = fewbit("quantize", model, "-o", tmp_path / "plain", *few, "--json")
    differ = [
        name
        for name, tensor in models.tensors_of(tmp_path / "plain").items()
        if not tensor.equal(models.tensors_of(tmp_path / "out")[name])
    ]
    assert any(name.endswith(".qweight") for name in differ)
    lost, less = (sum(t["error"] for t in answer.json["tensors"]) for answer in (done, plain))
    assert less < lost


def test_scheme_method_and_format_replace_the_plans(model: Path, fewbit: Fewbit, tmp_path: Path) -> None:
    flags = ("--scheme", "int3-g32", "--method", "rtn", "--format", "gptq")
    assert fewbit("quantize", model, "-o", tmp_path / "out", *flags).code == 0
    found = fewbit("inspect", tmp_path / "out", "--json").json
    assert found["schemes"] == {"int3-g32": 14}
    assert found["bits_per_weight_quantized"] == pytest.approx(3 + 16 / 32 + 3 / 32, rel=0.02)


def test_a_plan_file_may_hold_json_values(model: Path, few: tuple[object, ...], fewbit: Fewbit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"damp": 0.05, "act_order": False, "refine": 0}
    rules = [
        {"match": "*.k_proj", "scheme": None},
        {"match": "*", "scheme": "int4-g32-sym", "method": "gptq", "options": options},
    ]
    (tmp_path / "plan.json").write_text(
        json.dumps({"name": "mine", "format": "gptq", "rules": rules}), encoding="utf-8"
    )
    answer = fewbit("quantize", model, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", *few, "--json")
    assert answer.code == 0, answer.err
    told = answer.json
    assert told["plan"] == "mine"
    assert len(told["tensors"]) == 12
    assert not any(tensor["module"].endswith("k_proj") for tensor in told["tensors"])
    words = ("--no-act-order", "--damp", "0.05", "--refine", "0")
    fewbit("quantize", model, "-o", tmp_path / "flags", *few, *words)
    ours, flagged = models.tensors_of(tmp_path / "out"), models.tensors_of(tmp_path / "flags")
    assert ours["model.layers.0.self_attn.q_proj.qweight"].equal(flagged["model.layers.0.self_attn.q_proj.qweight"])
    assert "model.layers.0.self_attn.k_proj.weight" in ours


def test_a_plan_that_was_recorded_can_be_used_again(
    quantized: Path, model: Path, fewbit: Fewbit, tmp_path: Path
) -> None:
    record = json.loads((quantized / "fewbit.json").read_text(encoding="utf-8"))
    (tmp_path / "plan.json").write_text(json.dumps(record["plan"]), encoding="utf-8")
    assert fewbit("quantize", model, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json").code == 0
    again, before = models.tensors_of(tmp_path / "out"), models.tensors_of(quantized)
    assert all(again[name].equal(before[name]) for name in before)


def test_quantize_says_what_it_did(model: Path, few: tuple[object, ...], fewbit: Fewbit, tmp_path: Path) -> None:
    answer = fewbit("quantize", model, "-o", tmp_path / "out", *few)
    assert answer.code == 0
    for words in ("note: groups of 32", "bits per quantized weight", "4.500", "x smaller", "Reopened and checked"):
        assert words in answer.out
    assert [line.split()[0] for line in answer.err.splitlines()] == ["block", "block", "writing", "checking"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in ("plan `gptq-4bit`", "int4-g32-sym", "4 x 32 tokens"):
        assert words in card
    record = json.loads((tmp_path / "out" / "fewbit.json").read_text(encoding="utf-8"))
    assert record["schema_version"] == 1
    assert record["calibration"]["samples"] == 4
    assert record["versions"]["fewbit"] == __version__
    assert len(record["tensors"]) == 14
    assert all(tensor["error"] > 0 and tensor["dropped"] == 0 for tensor in record["tensors"])


def test_inspect_of_both(model: Path, quantized: Path, fewbit: Fewbit) -> None:
    original, found = (fewbit("inspect", folder, "--json").json for folder in (model, quantized))
    assert original["format"] is None
    assert original["schemes"] == {}
    assert original["share"] == 0
    assert original["bits_per_weight"] == 16
    assert found["schemes"] == {"int4-g32-sym": 14}
    assert found["parameters"] == original["parameters"]
    assert found["bits_per_weight_quantized"] == 4.5
    assert found["weights_bytes"] < original["weights_bytes"]
    assert found["made"]["plan"]["name"] == "rtn-4bit"
    for folder, word in ((model, "not quantized"), (quantized, "int4-g32-sym in 14 tensors")):
        assert word in fewbit("inspect", folder).out


def test_evaluate_takes_16_windows_or_all(quantized: Path, text: Path, fewbit: Fewbit) -> None:
    flags = ("evaluate", quantized, "--text", text, "--length", 4, "--json")
    few, every = fewbit(*flags), fewbit(*flags, "--samples", "all")
    assert few.json["windows"] == 16
    assert every.json["windows"] == every.json["windows_available"] == few.json["windows_available"] > 16
    assert "window 1/16 " in few.err
    assert "window 16/16 " in few.err
    assert fewbit(*flags, "--samples", "some").code == 2
    assert evaluate.evaluate(quantized, text=str(text), length=4, samples=None).quality.windows == every.json["windows"]


def test_generate_stays_within_the_context(model: Path, fewbit: Fewbit) -> None:
    answer = fewbit("generate", model, "The cat", "--max-new-tokens", 4096)
    assert answer.code == 2
    assert "With 4,096 new tokens it exceeds the model's context of" in answer.err
    assert "a smaller --max-new-tokens" in answer.err


def test_evaluate_tells_what_was_promised(model: Path, quantized: Path, text: Path, fewbit: Fewbit) -> None:
    flags = ("--text", text, "--length", 64, "--samples", 3)
    told = fewbit("evaluate", quantized, "--reference", model, *flags, "--json").json
    assert {
        "perplexity",
        "reference_perplexity",
        "kl",
        "same_top",
        "weights_bytes",
        "bits_per_weight",
        "tokens",
    } <= told.keys()
    assert told["kl"].keys() == {"mean", "median", "p99", "p999", "max"}
    assert told["tokens"] == 3 * 63
    assert told["kl"]["mean"] > 0
    alone = fewbit("evaluate", quantized, *flags, "--json").json
    assert alone["perplexity"] == told["perplexity"]
    assert alone["kl"] is None
    shown = fewbit("evaluate", quantized, "--reference", model, *flags)
    assert shown.code == 0
    for words in ("perplexity", "KL divergence", "same top token", "bits per weight", f"{3 * 63} tokens"):
        assert words in shown.out


def test_evaluate_says_that_generate_rounds(
    quantized: Path, model: Path, text: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does: not with a kernel that was named, not where nothing is rounded, and not for a 16-bit model."""
    if not native.library():
        pytest.skip("without the C++ library nothing is rounded")
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")
    few = ("--text", text, "--length", 16, "--samples", 1, "--device", "cpu")
    said = "measured with exact activations; on a CPU, generate rounds them to 8 bits (kernel cpu measures that)"
    assert said in " ".join(fewbit("evaluate", quantized, *few).out.split())
    assert fewbit("evaluate", quantized, *few, "--json").json["notes"] == [said]
    for given in ((quantized, "--kernel", "cpu"), (quantized, "--kernel", "reference"), (model,)):
        assert fewbit("evaluate", *given, *few, "--json").json["notes"] == []
    monkeypatch.setenv("FEWBIT_ACTIVATIONS", "exact")
    assert fewbit("evaluate", quantized, *few, "--json").json["notes"] == []


def test_a_model_against_itself_has_lost_nothing(quantized: Path, text: Path, fewbit: Fewbit) -> None:
    flags = ("--reference", quantized, "--text", text, "--length", 64, "--samples", 2)
    told = fewbit("evaluate", quantized, *flags, "--json").json
    assert set(told["kl"].values()) == {0}
    assert told["same_top"] == told["perplexity_ratio"] == 1


def test_generate_is_greedy_and_may_chat(quantized: Path, fewbit: Fewbit) -> None:
    flags = ("the weight", "--max-new-tokens", 5)
    told = fewbit("generate", quantized, *flags, "--json").json
    assert told.keys() >= {"model", "prompt", "text"}
    again = fewbit("generate", quantized, *flags, "--json").json
    assert (told["text"], told["tokens"]) == (again["text"], again["tokens"])
    shown = fewbit("generate", quantized, *flags)
    assert shown.code == 0
    assert re.fullmatch(r"5 tokens: the first after [\d.]+ s, [\d.]+ tokens/s after the first\n", shown.err)
    assert shown.out.strip() == told["text"].strip()
    chat = fewbit("generate", quantized, *flags, "--chat", "--json")
    assert chat.code == 0
    assert chat.json["text"] != told["text"]


@pytest.mark.parametrize("name", ["auto", "cpu:0", "CPU"])
def test_other_names_of_the_cpu(
    name: str, model: Path, few: tuple[object, ...], fewbit: Fewbit, tmp_path: Path
) -> None:
    """As torch and transformers write it. `auto` is a GPU only if there is one."""
    if name == "auto" and torch.cuda.is_available():
        pytest.skip("here it is a GPU")
    there, text = ("--device", name, "--json"), ("--text", few[1], "--samples", 1, "--length", 16)
    made = fewbit("quantize", model, "-o", tmp_path / "out", "--plan", "rtn-4bit", *there)
    generated = [
        fewbit("generate", made.json["out"], "a", "--max-new-tokens", 2, "--device", each, "--json")
        for each in ("cpu", name)
    ]
    assert generated[1].json["text"] == generated[0].json["text"]
    assert fewbit("evaluate", made.json["out"], *text, *there).json["perplexity"] > 0
    assert fewbit("imatrix", model, "-o", tmp_path / "i.gguf", *few, *there).code == 0
    assert load(made.json["out"], device=name).device == torch.device("cpu")


def test_debug_shows_where_an_error_comes_from(fewbit: Fewbit) -> None:
    with pytest.raises(Exception, match="no such folder"):
        fewbit("inspect", "./nowhere", "--debug")


def test_as_a_program() -> None:
    """What a user runs: quick, in a process of its own, with the exit code of the error."""
    command = [sys.executable, "-m", "fewbit"]
    run = subprocess.run([*command, "inspect", "./nowhere"], capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: model ./nowhere: no such folder")
    assert (
        subprocess.run([*command, "--version"], capture_output=True, text=True, encoding="utf-8").stdout
        == f"{__version__}\n"
    )
