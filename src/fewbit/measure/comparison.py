"""The data of a comparison of plans on one model: the results of `fewbit compare`, as saved in report.json.

`Comparison.to_json` gives the content of report.json and `from_json` reads it; docs/reference.md explains every key.
Values are bytes, seconds, nats, and shares between 0 and 1, as measured. Within one `schema_version` keys are only
added, never changed or removed, and readers ignore unknown keys.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fewbit.brief import brief
from fewbit.errors import FormatError
from fewbit.measure import intervals
from fewbit.measure.intervals import Interval
from fewbit.system.files import read_json

T = TypeVar("T")

SCHEMA_VERSION = 1
KIND = "fewbit comparison"  # identifies a report.json of fewbit
FILE = "report.json"
ORIGINAL = "bf16"  # the plan that changes nothing: the original model in its own dtype, the baseline of all others


@dataclass(frozen=True)
class Timing:
    """The median of `runs` measurements, their minimum and maximum, and the 95 % confidence interval of the median.

    `interval` is None if there are too few runs for one, as in reports of early versions.
    """

    median: float
    low: float
    high: float
    runs: int
    interval: Interval | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        middle, ends = median(values), intervals.of_median(values)
        interval = None if ends is None else Interval(middle, *ends)
        return cls(middle, min(values), max(values), len(values), interval)

    @property
    def noisy(self) -> bool:
        """Whether the interval is so wide that the median is unreliable."""
        return self.interval is not None and (
            self.interval.high - self.interval.low > 2 * intervals.NOISY * self.interval.value
        )


def leaders(found: Sequence[Interval | None], *, more_is_better: bool = False) -> list[int]:
    """The indices of all candidates for the best: the best value, and those whose intervals overlap with its interval.

    A value without an interval (None) is a candidate too, since nothing is known of it. If all are None, the list is
    empty.
    """
    known = [(each.value if more_is_better else -each.value, i) for i, each in enumerate(found) if each is not None]
    if not known:
        return []
    best = found[max(known, key=lambda pair: (pair[0], -pair[1]))[1]]
    assert best is not None
    return [i for i, each in enumerate(found) if each is None or each.overlaps(best)]


def winners(found: Sequence[Interval | None], *, more_is_better: bool = False) -> list[int]:
    """The indices of the best: one that differs significantly from all others, or all with exactly the best value.

    Empty if there is no clear winner: fewer than two values, all values equal, or overlapping intervals.
    """
    first = leaders(found, more_is_better=more_is_better)
    if len(found) < 2 or not first or len(first) == len(found):
        return []
    alike = len({found[i] for i in first}) == 1 and all(
        e is not None and e.low == e.high for e in map(found.__getitem__, first)
    )
    return first if len(first) == 1 or alike else []


@dataclass(frozen=True)
class Peak:
    """Peak memory during one step, in bytes.

    process: peak resident memory (VmHWM) of the process that ran only this step, interpreter and imports included.
    growth: how far that exceeds what the process had before. cuda: peak of torch's allocator, summed over all GPUs.
    device: memory in use on the GPUs according to the driver, of all processes. The last two are 0 without GPUs.
    """

    process: int
    growth: int
    cuda: int = 0
    device: int = 0


@dataclass(frozen=True)
class Weights:
    """Bytes of a loaded model's tensors.

    at_rest: all parameters and buffers as they are in memory: packed weights packed, tied ones counted once.
    parameters: the sum of `p.numel() * p.element_size()` over `model.parameters()`.
    buffers: bytes that this sum leaves out, by the last part of the tensors' names, largest first.
    canonical: size of the weights according to their schemes, computed from the headers of the files.
    resident: memory that loading added to the process after every weight was read once, without library code.
    """

    at_rest: int
    parameters: int
    buffers: dict[str, int]
    canonical: int
    resident: int = 0


@dataclass(frozen=True)
class Loss:
    """The loss of quality of a plan on the text of the comparison, measured as in `fewbit evaluate`.

    kl: mean KL divergence from the original, nats per token. same_top: share of tokens for which both models have the
    same most likely token. drift: for each block in order, the relative squared error of its output hidden state, on
    the first window.
    """

    perplexity: Interval
    kl: Interval
    same_top: Interval
    drift: tuple[float, ...] = ()


@dataclass(frozen=True)
class Speed:
    """Load time and throughput.

    load: seconds until the model is ready, with its files in the page cache and without imports (one run).
    prefill: prompt tokens per second. decode: generated tokens per second, one at a time.
    """

    load: float
    prefill: Timing
    decode: Timing


@dataclass(frozen=True)
class Quantizing:
    """Time and memory for making the quantized model in its own process, including the check of the output."""

    seconds: float
    peak: Peak


@brief
@dataclass(frozen=True)
class Row:
    """One plan, with its measurements (status "done") or the `reason` why there are none (status "failed").

    Fields that a failed row lacks are None. reused: the numbers come from an earlier comparison. what: schemes and
    methods in words. errors: for each quantized module the relative squared error of its output on the calibration
    text, or of its weight if the method needs no calibration. For the original `quantizing` is None and `errors` empty.
    """

    plan: str
    status: Literal["done", "failed"]
    reason: str | None = None
    reused: bool = False
    format: str = ""
    what: str = ""
    disk_bytes: int | None = None
    bits_per_weight: float | None = None
    weights: Weights | None = None
    loading: Peak | None = None
    generating: Peak | None = None
    speed: Speed | None = None
    loss: Loss | None = None
    sample: str | None = None
    quantizing: Quantizing | None = None
    errors: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.status == "done"


@dataclass(frozen=True)
class Machine:
    """The machine of the measurements. memory: bytes of RAM; threads: used by torch; device: that of the model."""

    system: str
    cpu: str
    instructions: tuple[str, ...]
    threads: int
    memory: int
    devices: tuple[str, ...]
    device: str


@dataclass(frozen=True)
class TextUsed:
    """`samples` windows of `length` tokens from a text. digest: SHA-256 of the token ids."""

    text: str
    samples: int
    length: int
    digest: str
    seed: int | None = None


@brief
@dataclass(frozen=True)
class Comparison:
    """A comparison. Rows are in the order in which the plans were given.

    date: end of the comparison, ISO 8601, UTC. text: the text for measuring quality. calibration: None if no plan
    needed any. prompt: the prompt of the samples. prompt_tokens, new_tokens: lengths of the timed prefill and decoding.
    seconds: duration of the whole comparison.
    """

    model: str
    architecture: str
    parameters: int
    date: str
    machine: Machine
    versions: dict[str, str]
    text: TextUsed
    calibration: TextUsed | None
    prompt: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    rows: tuple[Row, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def reused(self) -> int:
        """How many rows come from earlier comparisons."""
        return sum(row.reused for row in self.rows)

    @property
    def original(self) -> Row | None:
        """The row of the original model, the baseline; None if it was not measured."""
        return next((row for row in self.rows if row.plan == ORIGINAL and row.done), None)

    @property
    def noise(self) -> str | None:
        """A warning about speeds that vary too much between runs; None if there are none."""
        noisy = [
            (f"{what} of {row.plan}", timing.interval, timing.runs)
            for row in self.rows
            if row.speed is not None
            for what, timing in (("prefill", row.speed.prefill), ("decode", row.speed.decode))
            if timing.interval is not None and timing.noisy
        ]
        if not noisy:
            return None
        what, interval, runs = max(noisy, key=lambda found: (found[1].high - found[1].low) / found[1].value)
        others = f" and {len(noisy) - 1} more" if len(noisy) > 1 else ""
        return (
            f"speed is noisy here: {what}{others}, {interval.low:.3g} to {interval.high:.3g} tokens/s after {runs} "
            "runs. Other programs may be running on this machine. Measure again with fewbit compare --again."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, with `kind` and `schema_version` first."""
        data = plain(self)
        return {"kind": KIND, "schema_version": data.pop("schema_version"), **data}

    @classmethod
    def from_json(cls, data: Any, where: str = FILE) -> Comparison:
        """The inverse of `to_json`. FormatError with `where` and the key if the data is not a valid report."""
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise FormatError(f"{where} is not a report of fewbit compare", f'A report has the "kind" "{KIND}".')
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            raise FormatError(
                f"{where} has schema_version {version!r}, this fewbit reads and writes {SCHEMA_VERSION}",
                "Compare again into another folder.",
            )
        return parsed(cls, data, where)

    @classmethod
    def read(cls, path: str | Path) -> Comparison:
        """The comparison in a report.json, or in a folder that contains one. FormatError if there is none."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        try:
            data = read_json(file)
        except OSError as error:
            raise FormatError(f"{file} is not a report of fewbit compare: {error.strerror}") from None
        except FormatError as error:
            raise FormatError(f"{file} is not a report of fewbit compare: {error.message}", error.hint) from None
        return cls.from_json(data, str(file))


@dataclass(frozen=True)
class Event:
    """Progress of one plan, number `number` of `total`.

    state: "quantizing" or "measuring", then "done", "reused" or "failed". While it runs, `done` of `of` blocks (of the
    model), runs (of a speed test, `of` is 0: their number depends on their noise) or windows (of text) are finished;
    `unit` says which. pid: the process that works on it.
    """

    plan: str
    number: int
    total: int
    state: str
    seconds: float = 0.0
    done: int = 0
    of: int = 0
    pid: int = 0
    reason: str = ""
    unit: str = ""


def plain(data: Any) -> dict[str, Any]:
    """A dataclass of this module as plain data, as `json.loads` would return it."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(data), allow_nan=False))
    return found


def parsed(kind: type[T], data: Any, where: str) -> T:
    """A dataclass of this module from plain data, with all types checked. FormatError names the wrong key."""
    return _read(kind, data, where)  # type: ignore[no-any-return]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, data: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_fields(kind, _checked(data, dict, where), where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if data is None else _read(next(a for a in arguments if a is not type(None)), data, where)
    if origin is Literal:
        if data not in arguments:
            raise FormatError(f"{where} is {data!r}, expected one of {', '.join(map(repr, arguments))}")
        return data
    if origin is tuple:
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_checked(data, list, where)))
    if origin is dict:
        return {
            name: _read(arguments[1], item, f"{where}.{name}") for name, item in _checked(data, dict, where).items()
        }
    if kind is float:
        return float(_checked(data, (int, float), where))
    return _checked(data, kind, where)


def _read_fields(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    found = {}
    for each in dataclasses.fields(kind):
        if each.name in data:
            found[each.name] = _read(_hints(kind)[each.name], data[each.name], f"{where}: {each.name}")
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where} lacks {each.name}")
    return kind(**found)


def _checked(data: Any, kind: Any, where: str) -> Any:
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise FormatError(f"{where} is {str(data)[:60]!r}, which has the wrong type")
    return data
