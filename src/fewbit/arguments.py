"""What the Python verbs take: an argument means the same in every verb, and is checked before any work.

`@checked` stands on each verb. It looks up every parameter by its name in `_CHECKS`, so a value of the wrong type or
size is one PlanError that names the argument. A parameter without a check is an error when the verb is defined: a new
one cannot be forgotten. Checks that need the model or the machine stay in the verbs.

What other libraries take is taken here too: `torch.device` objects, types by name, path-like objects, NumPy numbers,
plans as JSON, texts as a list.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from fewbit import names, registry
from fewbit.errors import ArgumentError, FormatError
from fewbit.files import parse_json
from fewbit.plan import Plan, find

if TYPE_CHECKING:
    import torch

    from fewbit.tuning import Tuning

P = ParamSpec("P")
R = TypeVar("R")

Texts: TypeAlias = str | os.PathLike[str] | Sequence[str]
Device: TypeAlias = "str | int | torch.device | None"
DType: TypeAlias = "str | torch.dtype | None"
Plans: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Plan

MOST = 2**31 - 1  # of whatever is counted
SAMPLES = 16  # windows of a text that quality is measured on, unless a verb is told otherwise
LAST_SEED = 2**32 - 1  # NumPy's generator, which transformers seeds too, takes no more
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True)
class Calibration:
    """`samples` windows of `length` tokens (at most the model's context), drawn by `seed` from a text.

    text: a name, a file, or a list of texts; None: tiny's own for the embedded model, pydoc for all others.
    """

    text: Texts | None = None
    samples: int = 128
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("text", "samples", "length", "seed"):
            value = getattr(self, name)
            if name != "text" or value is not None:
                object.__setattr__(self, name, _CHECKS[name](name, value))


@dataclass(frozen=True)
class Sampling:
    """How `generate` chooses each token: the most likely one at temperature 0, else a random one.

    top_k: choose among the k most likely tokens, 0 for all. top_p: choose among the most likely tokens whose
    probabilities add up to p, 1 for all. None: as generation_config.json says, else 50 and 1, as in transformers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {"temperature": number, "top_k": whole(0), "top_p": number, "seed": whole(0, LAST_SEED)}
        for name, check in checks.items():
            if (value := getattr(self, name)) is not None or name in ("temperature", "seed"):
                object.__setattr__(self, name, check(name, value))
        if self.temperature < 0:
            raise wrong("temperature", self.temperature, "0 for the most likely token, about 0.7 for some variety")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise wrong("top_p", self.top_p, "a number above 0, up to 1")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise wrong(name, value, "a temperature above 0 too: at 0 the most likely token always comes")

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        limits = {name: value for name in ("top_k", "top_p") if (value := getattr(self, name)) is not None}
        return {"do_sample": True, "temperature": self.temperature, **limits}


def checked(verb: Callable[P, R]) -> Callable[P, R]:
    """`verb`, whose arguments are checked by their names, and put in the form it works with, before it is called."""
    signature = inspect.signature(verb)
    logger = logging.getLogger(verb.__module__)
    if missing := signature.parameters.keys() - _CHECKS.keys():
        raise RuntimeError(f"{verb.__name__}: arguments.py has no check for {', '.join(sorted(missing))}")

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if value is not None or not (parameter.default is None or str(parameter.annotation).endswith("| None")):
                bound.arguments[name] = _CHECKS[name](name, value)
        result = verb(*bound.args, **bound.kwargs)
        for note in getattr(result, "notes", ()):  # the command line prints them
            logger.warning("%s", note)
        return result

    return call


def check(name: str, value: Any) -> None:
    """ArgumentError or PlanError for a value that the argument of this name cannot have, in whichever verb."""
    if name in _CHECKS:
        _CHECKS[name](name, value)


def wrong(name: str, value: object, wanted: str) -> ArgumentError:
    """The error for a value that an argument cannot have; `wanted` says what it can."""
    return ArgumentError(name, _brief.repr(value), wanted)


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def whole(low: int, high: int = MOST) -> Callable[[str, Any], int]:
    """A check for whole numbers of any library, except truth values."""

    def check(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool) or not low <= number <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return number

    return check


def number(name: str, value: Any) -> float:
    """A finite number; which ones make sense, the verb says."""
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(float(value)):
        raise wrong(name, value, "a finite number")
    return float(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def place(name: str, value: Any) -> str | Path:
    """A name or a path; a path-like object becomes a Path."""
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not given or "\0" in given:
        raise wrong(name, value, "a name or a path")
    return given if isinstance(value, str) else Path(given)


def model(name: str, value: Any) -> str | Path:
    """A model's name, or a folder or file that is there."""
    given = place(name, value)
    names.check(given)
    return given


def texts(name: str, value: Any) -> str | tuple[str, ...]:
    """What `calibration.load_text` takes: a name, a file's path, or the texts themselves."""
    if isinstance(value, (str, os.PathLike)):
        return str(place(name, value))
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not all(isinstance(each, str) for each in value):
        raise wrong(name, value, "the name of a text, a .txt, .jsonl or .json file, or a list of texts")
    if not any(each.strip() for each in value):
        raise wrong(name, value, "at least one text that is not empty")
    return tuple(value)


def calibration(name: str, value: Any) -> Calibration | str | tuple[str, ...]:
    """A Calibration, or the text of one whose other settings are the verb's own: `calibrated` puts the two together."""
    return value if isinstance(value, Calibration) else texts(name, value)


def calibrated(given: Calibration | Texts | None, usual: Calibration | None = None) -> Calibration:
    """What to calibrate on, where a verb was given a text alone, or nothing."""
    return given if isinstance(given, Calibration) else replace(usual or Calibration(), text=given)


def device(name: str, value: Any) -> str | None:
    """A device by its name. Whether it is here, only the machine knows."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"cuda:{value}"
    import torch

    if not isinstance(value, torch.device):
        raise wrong(name, value, 'a device such as "cpu", "cuda:1" or torch.device("cuda", 1)')
    return str(value)


def dtype(name: str, value: Any) -> torch.dtype | str:
    """A floating-point type of torch, or "auto"."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return "auto"
    import torch

    known = {kind: getattr(torch, kind) for kind in _DTYPES}
    if isinstance(value, str):
        bare = value.removeprefix("torch.")
        value = known.get(_SHORT.get(bare, bare), value)
    if not isinstance(value, torch.dtype) or value not in known.values():
        raise wrong(name, value, f'"auto", or one of {", ".join(_DTYPES)}, as a name or of torch')
    return value


def plan(name: str, value: Any) -> Plan:
    """A plan: its name, its file, its JSON, or itself."""
    if isinstance(value, Plan):
        return value
    if isinstance(value, Mapping):
        return Plan.from_json(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return Plan.from_json(parse_json(value, name))
        except FormatError as error:
            raise wrong(name, value, f"a plan's JSON: {error.message.removeprefix(f'{name}: ')}") from None
    if not isinstance(value, (str, os.PathLike)):
        raise wrong(name, value, "a plan by its name, a .json file, a dictionary as of Plan.to_json(), or a Plan")
    return find(str(place(name, value)))


def plans(name: str, value: Any) -> tuple[str, ...]:
    """Plans by their names or files, in a list, or in one text with commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence) or not all(isinstance(each, (str, os.PathLike)) for each in value):
        raise wrong(name, value, "a list of plans, by their names or .json files, or of folders of models")
    return tuple(str(place(name, each)) for each in value)


def kernel(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a kernel by its name (fewbit list)")
    registry.get("kernels", value)
    return value


def sampling(name: str, value: Any) -> Sampling:
    if not isinstance(value, Sampling):
        raise wrong(name, value, "a fewbit.api.Sampling")
    return value


def called(name: str, value: Any) -> Any:
    if not callable(value):
        raise wrong(name, value, "a function to call with each step")
    return value


def tuning(name: str, value: Any) -> Tuning:
    from fewbit.tuning import Tuning  # which checks its own fields by this module

    if not isinstance(value, Tuning):
        raise wrong(name, value, "a fewbit.tuning.Tuning")
    return value


def memory(name: str, value: Any) -> str | int:
    return value if isinstance(value, str) and value else whole(1, 2**63 - 1)(name, value)


def report(name: str, value: Any) -> Any:
    """A Comparison, which only recommend knows, or where one was written."""
    return value if hasattr(value, "rows") else place(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("out", "adapter", "reference_adapter", "imatrix"), place),
    **dict.fromkeys(("model", "reference", "base"), model),
    **dict.fromkeys(("text", "data"), texts),
    **dict.fromkeys(("prompt", "purpose", "target", "cache"), text),
    **dict.fromkeys(("samples", "length", "context", "batch", "fuse", "max_new_tokens"), whole(1)),
    "max_kl": number,
    **dict.fromkeys(
        ("overwrite", "safetensors_only", "trust_remote_code", "chat", "compile", "stream", "speed_first", "again"),
        flag,
    ),
    "calibration": calibration,
    "device": device,
    "dtype": dtype,
    "kernel": kernel,
    "memory": memory,
    "plan": plan,
    "plans": plans,
    "progress": called,
    "report": report,
    "sampling": sampling,
    "seed": whole(0, LAST_SEED),
    "tuning": tuning,
}
