"""The command line and the Python verbs have the same arguments, defaults and help."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Annotated, Any

import pytest
import typer
import typer.main

import fewbit
from fewbit.cli.app import app
from fewbit.cli.flags import Fields, checked
from fewbit.errors import ArgumentError, in_flags
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.loading import Loading
from fewbit.pipeline.optimization import Optimization
from fewbit.plans.budget import Budget
from fewbit.settings import Settings
from fewbit.texts.calibration import Calibration

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
VERBS = (
    *("quantize", "convert", "imatrix", "generate", "evaluate", "compare", "tune", "finetune", "merge"),
    *("push", "estimate", "recommend"),
)
GROUPS: dict[str, type[Settings]] = {"calibration": Calibration, "sampling": Sampling, "tuning": Tuning}
GROUPS |= {"optimization": Optimization, "budget": Budget}
# An argument of Python that a command calls otherwise, or does without.
OTHER_NAMES = {"out": "output", "fuse": "max_length", "speed_first": "speed", "images": "image"}
PYTHON_ONLY = {"progress", "stream", "dtype"}  # what a command shows, and how; the type of activations
# Flags that are no argument of the verb: JSON, plans by parts, what --dry-run and --table show in place of the verb.
COMMAND_ONLY = {"as_json", "method", "scheme", "format", "dry_run", "table"}
GROUP_NAMES = {"text": "calibration", "samples": "calibration_samples", "length": "calibration_length"}


def flags(verb: str) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in COMMANDS[verb].params if parameter.name != "help"}


def expected(verb: str) -> dict[str, Any]:
    """Name of the flag -> default, of every argument of the verb."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(getattr(fewbit, verb)).parameters.items():
        if name in PYTHON_ONLY:
            continue
        if name not in GROUPS:
            found[OTHER_NAMES.get(name, name)] = parameter.default
            continue
        default = parameter.default if isinstance(parameter.default, Settings) else GROUPS[name]()
        for each in fields(default):
            flag = each.name
            if name == "calibration":
                flag = GROUP_NAMES.get(flag, flag) if flag == "text" or verb in ("compare", "convert") else flag
            found.setdefault(flag, getattr(default, each.name))
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_has_the_arguments_of_its_verb(verb: str) -> None:
    shown, wanted = flags(verb), expected(verb)
    if verb == "merge":  # it calibrates with the usual settings
        wanted.pop("seed")
    if verb == "generate":
        shown.pop("fuse")  # a switch beside --max-length
        wanted.pop("tensor_parallel")  # torchrun decides
    assert shown.keys() - COMMAND_ONLY == wanted.keys()
    for name, default in wanted.items():
        if default is inspect.Parameter.empty or shown[name].required:
            continue
        value = shown[name].default
        if isinstance(default, tuple):
            value = tuple(value.split(",")) if value else ()
        if name == "speed":
            value = value == "first"
        assert value == default, name


@pytest.mark.parametrize(
    ("verb", "group"),
    [
        ("quantize", Calibration),
        ("quantize", Budget),
        ("compare", Calibration),
        ("finetune", Tuning),
        ("tune", Optimization),
        ("generate", Sampling),
        ("generate", Loading),
    ],
)
def test_the_help_of_a_flag_is_that_of_its_field(verb: str, group: type[Settings]) -> None:
    shown = " ".join(str(parameter.help) for parameter in flags(verb).values()).replace(" - for stdin,", "")
    hidden = {"dtype", "exact_activations", "fuse", "tensor_parallel"}
    for each in fields(group):
        if each.name not in hidden:
            assert in_flags(each.metadata["help"]) in shown
        assert each.metadata["help"] in str(group.__doc__)


def test_a_group_becomes_flags_and_comes_back_packed() -> None:
    seen: list[Any] = []

    def packed(tuning: Annotated[Tuning, Fields("targets", "steps", rank="lora_rank")] = Tuning(rank=4)) -> None:
        seen.append(tuning)

    command: Any = checked(packed)
    parameters = inspect.signature(command).parameters
    assert {name: each.default for name, each in parameters.items()} == {"lora_rank": 4, "targets": None, "steps": None}
    command(lora_rank=2, targets="q_proj, v_proj", steps=None)
    assert seen == [Tuning(rank=2, targets=("q_proj", "v_proj"))]
    with pytest.raises(ArgumentError, match="lora_rank=0"):
        command(lora_rank=0, targets=None, steps=None)
    with pytest.raises(ArgumentError, match="steps=0"):
        command(lora_rank=1, targets=None, steps=0)
