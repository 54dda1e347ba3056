"""What the Python verbs take, and one sentence for what they do not, before any work."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import fewbit
from fewbit import checks
from fewbit.api import arguments
from fewbit.errors import FormatError, PlanError
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.loading import Loading
from fewbit.plans.plan import PRESETS, find
from fewbit.texts import sources
from fewbit.texts.calibration import Calibration
from tests import models

VERBS = tuple(name for name in fewbit.__all__ if name[0].islower() and name != "prefer")
GIVEN: dict[str, Any] = {
    "model": "tiny",
    "out": "out",
    "prompt": "a",
    "data": "pydoc",
    "purpose": "edge",
    "to": "awq",
    "reference": "tiny",
    "repo": "org/name",
}
NUMBERS = ("samples", "length", "limit", "context", "batch", "fuse", "max_new_tokens", "seed", "max_kl")


def parameters(verb: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(fewbit, verb)).parameters)


def call(verb: str, **more: Any) -> Any:
    needed = {n: GIVEN[n] for n, p in parameters(verb).items() if p.default is inspect.Parameter.empty}
    return getattr(fewbit, verb)(**{**needed, **more})


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(GIVEN, "adapter", models.empty_adapter(tmp_path_factory.mktemp("adapter")))
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_type_is_named_by_every_verb(verb: str, place: Path) -> None:
    for name in parameters(verb):
        with pytest.raises(PlanError) as error:
            call(verb, **{name: object()})
        assert str(error.value).startswith(f"{name}=")
        assert "\n" not in str(error.value)
    assert not list(place.iterdir())


@pytest.mark.parametrize("value", [-1, 2**70, float("nan"), float("inf"), "7", True, 1.5j, [1]], ids=str)
def test_a_wrong_number_is_named_by_every_verb(value: object) -> None:
    for verb in VERBS:
        for name in set(NUMBERS) & parameters(verb).keys():
            if (name, value) == ("max_kl", 2**70):
                continue  # a number, too
            if (verb, name, value) == ("generate", "fuse", True):
                continue  # a cache as long as the text
            with pytest.raises(PlanError, match=f"^{name}="):
                call(verb, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, float("nan"), 10**400, "7", None, True)),
        *(("top_k", value) for value in (-1, 0.5, 2**70, "7", True)),
        *(("top_p", value) for value in (0, -0.1, 1.1, float("nan"), "1", True)),
        *(("seed", value) for value in (-1, 2**32, None)),
    ],
    ids=lambda value: f"{value!s:.20}",
)
def test_a_sampling_checks_its_numbers(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"^{name}="):
        Sampling(**{"temperature": 0.7, name: value})


@pytest.mark.parametrize("given", [{"top_k": 5}, {"top_p": 0.9}])
def test_limits_without_a_temperature_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="a temperature above 0"):
        Sampling(**given)


@pytest.mark.parametrize("name", ["samples", "length", "seed"])
@pytest.mark.parametrize("value", [-1, 2**70, "7", None, 0.5])
def test_a_calibration_checks_its_numbers(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"^{name}="):
        Calibration(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", "8"),
        ("steps", 1.5),
        ("seed", 2**70),
        ("alpha", float("nan")),
        ("learning_rate", 10**400),
        ("dropout", "0"),
        ("targets", "q_proj"),
    ],
    ids=lambda value: f"{value!s:.20}",
)
def test_a_tuning_checks_its_types(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"^{name}="):
        Tuning(**{name: value})


@pytest.mark.parametrize(
    ("check", "value", "wanted"),
    [
        (checks.device, torch.device("cpu"), "cpu"),
        (checks.device, torch.device("cuda", 1), "cuda:1"),
        (checks.device, 1, "cuda:1"),
        (checks.device, "1", "cuda:1"),
        (checks.device, "CUDA:1", "cuda:1"),
        (checks.device, "CPU", "cpu"),
        (checks.device, "cpu:0", "cpu"),
        (checks.device, torch.device("cpu", 0), "cpu"),
        (checks.device, "Auto", "auto"),
        (checks.dtype, "float16", torch.float16),
        (checks.dtype, "torch.bfloat16", torch.bfloat16),
        (checks.dtype, torch.float32, torch.float32),
        (checks.dtype, "bf16", torch.bfloat16),
        (checks.dtype, "auto", "auto"),
        (checks.path, Path("a"), Path("a")),
        (sources.checked, Path("pydoc"), "pydoc"),
        (sources.checked, ["a", "b"], ("a", "b")),
        (sources.checked_or_self, "self", "self"),
        (checks.integer(1), numpy.int64(3), 3),
        (checks.number, numpy.float32(0.5), 0.5),
        (arguments.plan, "nf4", PRESETS["nf4"]),
        (arguments.plan, PRESETS["nf4"], PRESETS["nf4"]),
        (arguments.plan, PRESETS["nf4"].to_json(), PRESETS["nf4"]),
        (arguments.plans, "nf4, int8", ("nf4", "int8")),
        (arguments.plans, ["nf4", Path("a.json")], ("nf4", "a.json")),
    ],
)
def test_what_other_libraries_take(check: Callable[[str, Any], Any], value: object, wanted: object) -> None:
    assert check("it", value) == wanted


def test_home_folders_are_completed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every path, also that of an output. A file whose name begins with ~ has it as it is."""
    monkeypatch.setenv("HOME", str(place))
    (place / "~old").mkdir()
    plan = PRESETS["nf4"]
    (place / "mine.json").write_text(json.dumps(plan.to_json()), encoding="utf-8")
    for given, wanted in (("~/a", f"{place}/a"), (Path("~/a"), place / "a"), ("~old/a", "~old/a"), ("~old", "~old")):
        assert checks.path("out", given) == wanted
    with pytest.raises(PlanError, match=r"~new/a: there is no home folder ~new\nWrite ./~new/a"):
        checks.path("out", "~new/a")
    assert find("~/mine.json") == plan
    models.empty_adapter(place / "lora")
    assert Loading(adapter="~/lora").adapter == f"{place}/lora"
    fewbit.quantize("tiny", "~/out", plan="~/mine.json")
    assert (place / "out" / "fewbit.json").is_file()


@pytest.mark.parametrize("value", ["int8", "float8", torch.int8, 16, "torch"])
def test_no_other_type_of_numbers(value: object) -> None:
    with pytest.raises(PlanError, match=r"^dtype=.*float16"):
        checks.dtype("dtype", value)


@pytest.mark.parametrize("value", ["", "a\0b", b"a", 3])
def test_no_other_paths(value: object) -> None:
    with pytest.raises(PlanError, match=r"^out="):
        checks.path("out", value)


@pytest.mark.parametrize("value", [[], ["", " "], ["a", 1], b"a", {"a": 1}, 7])
def test_no_other_texts(value: object) -> None:
    with pytest.raises(PlanError, match=r"^text="):
        Calibration(value)  # type: ignore[arg-type]


def test_a_long_value_is_shown_in_short() -> None:
    with pytest.raises(PlanError) as error:
        checks.integer(1)("samples", "7" * 10000)
    assert len(str(error.value)) < 200


def test_an_unknown_argument_says_where_it_belongs() -> None:
    with pytest.raises(TypeError) as raised:
        fewbit.quantize("tiny", "out", samples=8)  # type: ignore[call-arg]
    hint = "Give calibration=fewbit.Calibration(samples=...)"
    assert str(raised.value) == f"quantize() has no argument 'samples'. {hint}"
    with pytest.raises(TypeError, match=r"quantize\(\) has no argument 'pan'. Did you mean plan\?"):
        fewbit.quantize("tiny", "out", pan="nf4")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"quantize\(\): missing a required argument: 'out'"):
        fewbit.quantize("tiny")  # type: ignore[call-arg]


@pytest.mark.parametrize("given", ["method", "scheme", "format", "damp"])
@pytest.mark.parametrize("verb", [fewbit.quantize, fewbit.preview, fewbit.merge])
def test_an_argument_that_a_plan_says_shows_a_plan(verb: Any, given: str) -> None:
    with pytest.raises(TypeError) as raised:
        verb("tiny", "out", **{given: "rtn"})
    said, plan = str(raised.value).split("plan=")
    assert said == f"{verb.__name__}() has no argument {given!r}. A plan says it: "
    shown = arguments.plan("plan", ast.literal_eval(plan))
    (rule,) = shown.rules
    assert (rule.method, dict(rule.options)) == ("gptq", {"damp": "0.01"})


@pytest.mark.parametrize("group", [Sampling, Calibration, fewbit.Budget, Tuning, fewbit.Optimization])
def test_a_field_that_there_is_not_names_the_others(group: Any) -> None:
    with pytest.raises(TypeError) as raised:
        group(foo=1)
    assert str(raised.value).startswith(f"{group.__name__} has no field 'foo'. Known: ")
    for name in inspect.signature(group).parameters:
        assert name in str(raised.value)
        with pytest.raises(TypeError, match=f"Did you mean {name}"):
            group(**{f"{name}_": 1})
    with pytest.raises(TypeError, match="has no field 'foo'"):
        replace(group(), foo=1)


def test_a_loaded_model_is_no_name() -> None:
    with pytest.raises(PlanError) as raised:
        fewbit.generate(torch.nn.Linear(2, 2), "Once")  # type: ignore[arg-type]
    expected = "expected a name or a path, not a loaded model: save it with save_pretrained and give the folder"
    assert str(raised.value) == f"model=<Linear>: {expected}, or call its own model.generate"


def test_a_file_that_is_no_gguf_file_is_refused(place: Path) -> None:
    (place / "m.gguf").write_bytes(b"GGML" + bytes(60))
    with pytest.raises(FormatError, match="does not begin with GGUF"):
        arguments.check("model", "m.gguf")


def test_an_argument_without_a_check_is_an_error() -> None:
    def verb(model: str, novelty: int) -> None: ...

    with pytest.raises(RuntimeError, match=r"verb: .*novelty"):
        arguments.checked(verb)


def test_a_text_alone_keeps_the_verbs_own_sizes() -> None:
    usual = Calibration(samples=3, length=4)
    assert arguments.calibrated("pydoc", usual) == Calibration("pydoc", 3, 4)
    assert arguments.calibrated(None) == Calibration()
    assert arguments.calibrated(usual) is usual


@pytest.mark.parametrize("verb", ["quantize", "imatrix", "compare", "convert"])
def test_only_tune_writes_its_own_texts(verb: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"to": "awq", "requantize": True, "plan": "awq-4bit"} if verb == "convert" else {}
    with pytest.raises(PlanError, match=r"calibration=self is for tune, .*\nKnown: c4, pydoc"):
        getattr(fewbit, verb)("tiny", out=tmp_path / "out.dat", calibration="self", **more)
    assert list(tmp_path.iterdir()) == []
