"""Checks the arguments of the Python verbs. An argument means the same in every verb; checks run before any work.

`@checked` decorates each verb. It looks up every parameter by its name in `_CHECKS`. If a value has the wrong type or
size, it raises one PlanError that names the argument. A parameter without a check is an error when the verb is defined,
so no check can be forgotten. Checks that need the model or the machine stay in the verbs.

Values of other libraries also work: `torch.device` objects, types by name, path-like objects, NumPy numbers,
plans as JSON, texts as a list.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from fewbit import names
from fewbit.checks import MAX_SEED, Texts, above_0, cache_type, file, flag, integer, invalid, path, size, text
from fewbit.checks import Device as Device
from fewbit.checks import DType as DType
from fewbit.errors import ArgumentError, FormatError, PlanError
from fewbit.measure import tasks as measured
from fewbit.methods.base import option_types
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.loading import Loading, adapter
from fewbit.plans.budget import Budget
from fewbit.plans.plan import Plan, find
from fewbit.settings import checks_of
from fewbit.system import publish, ranks
from fewbit.system.files import parse_json
from fewbit.texts import sources
from fewbit.texts.calibration import Calibration

if TYPE_CHECKING:
    from fewbit.models.adapters.tuning import Tuning
    from fewbit.pipeline.optimization import Optimization

P = ParamSpec("P")
R = TypeVar("R")

Images: TypeAlias = str | os.PathLike[str] | Sequence[Any]
Plans: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Plan

_PLAN = (  # as a flag of the command line would make one
    "plan={'name': 'mine', 'format': 'gptq', 'rules': "
    "[{'match': '*', 'scheme': 'int4-g128-sym', 'method': 'gptq', 'options': {'damp': 0.01}}]}"
)
EFFORTS = ("fast", "high", "best")  # of `quantize`
SAMPLES = 16  # default number of windows of a text to measure quality on


def checked(verb: Callable[P, R]) -> Callable[P, R]:
    """Decorate `verb`: check each argument by its name and convert it before the call.

    While it runs, no other process can make the same output. Under torchrun, a verb that is not in `ranks.SHARED` or
    `ranks.EACH` runs in rank 0 only.
    """
    signature = inspect.signature(verb)
    logger = logging.getLogger(verb.__module__)
    shared = verb.__name__ in ranks.SHARED
    alone = not shared and verb.__name__ not in ranks.EACH
    if missing := signature.parameters.keys() - _CHECKS.keys():
        raise RuntimeError(f"{verb.__name__}: api/arguments.py has no check for {', '.join(sorted(missing))}")

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(_of_call(verb.__name__, signature, kwargs) or f"{verb.__name__}(): {error}") from None
        with ranks.telling() if shared else nullcontext():
            for name, value in bound.arguments.items():
                parameter = signature.parameters[name]
                if value is not None or not (parameter.default is None or str(parameter.annotation).endswith("| None")):
                    bound.arguments[name] = _CHECKS[name](name, value)
            with ranks.one_process(verb.__name__) if alone else nullcontext(), publish.claims():
                result = verb(*bound.args, **bound.kwargs)
        for note in getattr(result, "notes", ()):  # the command line prints them
            logger.warning("%s", note)
        return result

    return call


def _of_call(verb: str, signature: inspect.Signature, given: Iterable[str]) -> str | None:
    """The error for an argument that the verb does not have, and where it belongs; None if it has all given ones."""
    unknown = next((name for name in given if name not in signature.parameters), None)
    if unknown is None:
        return None
    groups: dict[str, Any] = {"calibration": Calibration, "sampling": Sampling, "budget": Budget}
    for name, group in groups.items():
        if name in signature.parameters and unknown in {field.name for field in fields(group)}:
            return f"{verb}() has no argument {unknown!r}. Give {name}=fewbit.{group.__name__}({unknown}=...)"
    if "plan" in signature.parameters and unknown in ("method", "scheme", "format", *option_types()):
        return f"{verb}() has no argument {unknown!r}. A plan says it: {_PLAN}"
    near = difflib.get_close_matches(unknown, signature.parameters, n=1)
    return f"{verb}() has no argument {unknown!r}." + (f" Did you mean {near[0]}?" if near else "")


def check(name: str, value: Any) -> Any:
    """`value` as a verb takes it for the argument `name`. ArgumentError or PlanError if it is invalid."""
    return _CHECKS[name](name, value) if name in _CHECKS else value


def model(name: str, value: Any) -> str | Path:
    """A model's name, or an existing folder or file."""
    if hasattr(value, "named_parameters"):
        raise ArgumentError(
            name,
            f"<{type(value).__name__}>",
            "a name or a path, not a loaded model: save it with save_pretrained and give the folder, "
            "or call its own model.generate",
        )
    given = path(name, value)
    names.check(given)
    place = names.path_of(given)
    if place is not None and place.suffix == ".gguf" and place.is_file() and not _begins(place):
        raise FormatError(
            f"{place}: it does not begin with GGUF", "It is no GGUF file, or it is damaged. Get it again."
        )
    return given


def repo(name: str, value: Any) -> str:
    """The name of a repository of the Hub, with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, by its documentation

    try:
        validate_repo_id(text(name, value))
        reason = "" if value.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        reason = str(error).partition("\n")[0]
    if reason:
        raise PlanError(
            f"`{name}={value}` is no name of a repository: {reason}",
            "Give OWNER/NAME; OWNER is a user or an organization.",
        )
    return str(value)


def _begins(place: Path) -> bool:
    """Whether a file begins as GGUF files do, or cannot be read. Its reader says what else is wrong."""
    try:
        with open(place, "rb") as opened:
            return opened.read(4) in (b"GGUF", b"")
    except OSError:
        return True


def existing(name: str, value: Any) -> str | Path:
    """A file that exists."""
    given = file(name, value)
    if not os.path.isfile(given):
        raise PlanError(f"`{name}={given}`: there is no such file")
    return given


def mmproj(name: str, value: Any) -> str | Path:
    """A GGUF file here or of the Hub."""
    given = file(name, value)
    return given if names.hub_file(str(given)) is not None else existing(name, value)


def calibration(name: str, value: Any) -> Calibration | str | tuple[str, ...]:
    """A Calibration, or only its text. `calibrated` adds the verb's default settings to a text."""
    return value if isinstance(value, Calibration) else sources.checked_or_self(name, value)


def calibrated(
    given: Calibration | Texts | None, usual: Calibration | None = None, *, written: bool = False
) -> Calibration:
    """Complete a Calibration: a text alone, or None, gets the other settings from `usual`.

    written: the text may be "self", which the model writes. Else PlanError for it.
    """
    found = given if isinstance(given, Calibration) else replace(usual or Calibration(), text=given)
    if found.text == sources.SELF and not written:
        known = f"Known: {', '.join(sources.SOURCES)}."
        raise PlanError("`calibration=self` is for tune, where the original writes the texts", known)
    return found


def plan(name: str, value: Any) -> Plan:
    """A plan, given as its name, its file, its JSON or a Plan."""
    if isinstance(value, Plan):
        return value
    if isinstance(value, Mapping):
        return Plan.from_json(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return Plan.from_json(parse_json(value, name))
        except FormatError as error:
            raise invalid(name, value, f"a plan's JSON: {error.message.removeprefix(f'{name}: ')}") from None
    if not isinstance(value, (str, os.PathLike)):
        raise invalid(name, value, "a plan's name, a .json file, a dictionary as Plan.to_json() returns, or a Plan")
    return find(str(path(name, value)))


def plans(name: str, value: Any) -> tuple[str, ...]:
    """Plans by name or file, as a list or as one comma-separated string."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence) or not all(isinstance(each, (str, os.PathLike)) for each in value):
        raise invalid(name, value, "a list of plan names, .json files or folders of models")
    return tuple(str(path(name, each)) for each in value)


def tasks(name: str, value: Any) -> tuple[str, ...]:
    """Tasks by name or YAML file, as a list or as one comma-separated string."""
    if isinstance(value, os.PathLike):
        value = [value]
    elif isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence) or not value or not all(isinstance(each, (str, os.PathLike)) for each in value):
        raise invalid(name, value, "a list of names of tasks, or of .yaml files")
    found = tuple(dict.fromkeys(str(path(name, each)) for each in value))
    measured.check(found)
    return found


def effort(name: str, value: Any) -> str:
    if value not in EFFORTS:
        raise invalid(name, value, ", ".join(EFFORTS[:-1]) + f" or {EFFORTS[-1]}")
    return str(value)


def images(name: str, value: Any) -> tuple[Any, ...]:
    """One image or several: files, or images of pillow."""
    each = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    return tuple(one if hasattr(one, "convert") else existing(name, one) for one in each)


def keys(name: str, value: Any) -> dict[str, str]:
    """Keys and their values as text: a mapping, or KEY=VALUE as a list."""
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    if isinstance(pairs, Iterable) and not isinstance(pairs, (str, bytes)):
        split = [each.split("=", 1) if isinstance(each, str) else each for each in pairs]
        if all(len(each) == 2 and all(isinstance(part, str) for part in each) for each in split):
            return dict(split)
    raise invalid(name, value, "KEY=VALUE, or a dictionary of keys and their values as text")


def sampling(name: str, value: Any) -> Sampling:
    if not isinstance(value, Sampling):
        raise invalid(name, value, "a fewbit.Sampling")
    return value


def progress(name: str, value: Any) -> Any:
    """Whether to show progress, or a function that is called with each step."""
    if not isinstance(value, bool) and not callable(value):
        raise invalid(name, value, "True, False, or a function to call with each step")
    return value


def tuning(name: str, value: Any) -> Tuning:
    from fewbit.models.adapters.tuning import Tuning  # its constructor has checked the fields

    if not isinstance(value, Tuning):
        raise invalid(name, value, "a fewbit.Tuning")
    return value


def budget(name: str, value: Any) -> Budget:
    if not isinstance(value, Budget):
        raise invalid(name, value, "a fewbit.Budget")
    return value


def optimization(name: str, value: Any) -> Optimization:
    from fewbit.pipeline.optimization import Optimization  # its constructor has checked the fields

    if not isinstance(value, Optimization):
        raise invalid(name, value, "a fewbit.Optimization")
    return value


def memory(name: str, value: Any) -> str | int:
    """An amount of memory, as it is given: the plan of `fit` has it in its name."""
    if not isinstance(value, str):
        return integer(1, 2**63 - 1)(name, value)
    size(name, value)
    return value


def report(name: str, value: Any) -> Any:
    """A Comparison, or the path of a saved one. Only `recommend` uses it."""
    return value if hasattr(value, "rows") else path(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **checks_of(Loading),
    "out": path,
    "reference_adapter": adapter,
    **dict.fromkeys(("model", "reference", "base"), model),
    "imatrix": existing,
    "mmproj": mmproj,
    **dict.fromkeys(("text", "data"), sources.checked),
    **dict.fromkeys(("prompt", "revision", "message"), text),
    "cache": cache_type,
    **dict.fromkeys(("purpose", "target", "to"), lambda name, value: text(name, value).lower()),
    **dict.fromkeys(("samples", "length", "context", "batch", "limit", "max_new_tokens"), integer(1)),
    "effort": effort,
    "images": images,
    "max_kl": above_0,
    "max_shard": size,
    **dict.fromkeys(("overwrite", "safetensors_only", "chat", "stream", "speed_first", "again", "measure"), flag),
    **dict.fromkeys(("requantize", "public", "record", "metadata"), flag),
    "budget": budget,
    "calibration": calibration,
    **dict.fromkeys(("memory", "fit"), memory),
    "optimization": optimization,
    "plan": plan,
    "plans": plans,
    "progress": progress,
    "repo": repo,
    "report": report,
    "sampling": sampling,
    "seed": integer(0, MAX_SEED),
    "set": keys,
    "tasks": tasks,
    "tuning": tuning,
}
