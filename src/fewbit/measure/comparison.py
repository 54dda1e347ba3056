"""A comparison of plans on one model: what `fewbit compare` measured, as data that is kept, read again and shown.

`Comparison.to_json` is report.json and `from_json` reads it back; docs/reference.md explains every key. Numbers are as
measured: bytes, seconds, nats, shares between 0 and 1. Within one `schema_version` keys are added, never changed or
removed, and a reader ignores those that it does not know.
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
from fewbit.system.files import read_json

T = TypeVar("T")

SCHEMA_VERSION = 1
KIND = "fewbit comparison"  # how a report.json of ours is told from others
FILE = "report.json"
ORIGINAL = "bf16"  # the plan that changes nothing: the original, in its own type, which all others are compared with


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the two cannot be told apart."""
        return self.low <= other.high and other.low <= self.high

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value, value, value)


@dataclass(frozen=True)
class Timing:
    """The median of `runs` measurements, the lowest and the highest of them, and the 95 % interval of the median: None
    where there are too few runs for one, as in reports of early versions."""

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
        """Whether the interval is so wide that the median says little."""
        return self.interval is not None and (
            self.interval.high - self.interval.low > 2 * intervals.NOISY * self.interval.value
        )


def leaders(found: Sequence[Interval | None], *, more_is_better: bool = False) -> list[int]:
    """The indices of all that may be the best: that of the best value, and those that cannot be told apart from it.

    Of one without an interval nothing is known, so it may be the best too; without any other, there is no leader.
    """
    known = [(each.value if more_is_better else -each.value, i) for i, each in enumerate(found) if each is not None]
    if not known:
        return []
    best = found[max(known, key=lambda pair: (pair[0], -pair[1]))[1]]
    assert best is not None
    return [i for i, each in enumerate(found) if each is None or each.overlaps(best)]


def winners(found: Sequence[Interval | None], *, more_is_better: bool = False) -> list[int]:
    """The indices of the best: one that is told apart from all others, or all that have exactly the best value.

    Empty where there is no choice: fewer than two, all the same, or intervals that overlap.
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
    """The most memory while something was done, in bytes.

    process: resident, of the process that did nothing else (VmHWM); its interpreter and imports are in it.
    growth: what of that came on top of what the process held before. cuda: by torch's allocator, over all GPUs.
    device: in use on the GPUs as their driver counts, whoever used it. The last two are 0 where there are none.
    """

    process: int
    growth: int
    cuda: int = 0
    device: int = 0


@dataclass(frozen=True)
class Weights:
    """Bytes of a loaded model's tensors.

    at_rest: every parameter and buffer as it lies in memory, packed ones as they are, tied ones once.
    parameters: what summing `p.numel() * p.element_size()` over `model.parameters()` gives.
    buffers: what that sum leaves out, by the last part of the tensors' names, the largest first.
    canonical: what schemes say that weights in the files take, from their headers alone.
    resident: what loading added to the process once every weight was touched, code of libraries not counted.
    """

    at_rest: int
    parameters: int
    buffers: dict[str, int]
    canonical: int
    resident: int = 0


@dataclass(frozen=True)
class Loss:
    """What a plan lost, on the text of the comparison: as `fewbit evaluate` measures it.

    kl: mean KL divergence from the original, nats per token. same_top: share of tokens where both choose the same.
    drift: for each block in order, the relative squared error of the hidden state that leaves it, on the first window.
    """

    perplexity: Interval
    kl: Interval
    same_top: Interval
    drift: tuple[float, ...] = ()


@dataclass(frozen=True)
class Speed:
    """load: seconds until the model is ready, files in the system's cache, imports not counted (one run).

    prefill: tokens of a prompt read a second. decode: tokens written a second after it, one at a time.
    """

    load: float
    prefill: Timing
    decode: Timing


@dataclass(frozen=True)
class Quantizing:
    """What making the quantized model took, in a process of its own; checking what was written included."""

    seconds: float
    peak: Peak


@brief
@dataclass(frozen=True)
class Row:
    """One plan: what it is, and either what was measured ("done") or why it was not ("failed", `reason`).

    What a failed row lacks is None. reused: the numbers are of an earlier comparison. what: schemes and methods in
    words. errors: for each quantized module the relative squared error of what it computes on the calibration text, or
    of its weight where the method needs no calibration (`quantizing` is None, and `errors` empty, for the original).
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
    """What it was measured on. memory: bytes it has; threads: that torch used; device: of the model."""

    system: str
    cpu: str
    instructions: tuple[str, ...]
    threads: int
    memory: int
    devices: tuple[str, ...]
    device: str


@dataclass(frozen=True)
class TextUsed:
    """So many windows of `length` tokens of a text; digest: SHA-256 of the token ids."""

    text: str
    samples: int
    length: int
    digest: str
    seed: int | None = None


@brief
@dataclass(frozen=True)
class Comparison:
    """Rows in the order in which the plans were asked for. date: ISO 8601, UTC, when the comparison ended.

    text: what quality was measured on. calibration: None where no plan needed any. prompt: what every sample continues.
    prompt_tokens and new_tokens: of the prefill and the decoding that were timed. seconds: of the whole comparison.
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
        """How many rows are of earlier comparisons."""
        return sum(row.reused for row in self.rows)

    @property
    def original(self) -> Row | None:
        """The row that the others are compared with, if it was measured."""
        return next((row for row in self.rows if row.plan == ORIGINAL and row.done), None)

    @property
    def noise(self) -> str | None:
        """A sentence on the speeds whose runs differ so much that they say little; None where there are none."""
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
            "runs. Other programs may use this machine; fewbit compare --again measures anew."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, `kind` and `schema_version` first."""
        data = plain(self)
        return {"kind": KIND, "schema_version": data.pop("schema_version"), **data}

    @classmethod
    def from_json(cls, data: Any, where: str = FILE) -> Comparison:
        """The comparison that `to_json` gave; FormatError, naming `where` and the key, for anything else."""
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise FormatError(f"{where} is no report of fewbit compare", f'Its "kind" would be "{KIND}".')
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            raise FormatError(
                f"{where} has schema_version {version!r}, this fewbit reads and writes {SCHEMA_VERSION}",
                "Compare again into another folder.",
            )
        return parsed(cls, data, where)

    @classmethod
    def read(cls, path: str | Path) -> Comparison:
        """The comparison in a report.json, or in the folder that holds one; FormatError where there is none."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        try:
            data = read_json(file)
        except (OSError, FormatError) as error:
            raise FormatError(f"{file} is no report of fewbit compare: {error}") from None
        return cls.from_json(data, str(file))


@dataclass(frozen=True)
class Event:
    """Progress of one plan, the `number`th of `total`: "quantizing" (with blocks `done` of `of`), "measuring", then
    "done", "reused" or "failed". pid: of the process that is at it."""

    plan: str
    number: int
    total: int
    state: str
    seconds: float = 0.0
    done: int = 0
    of: int = 0
    pid: int = 0
    reason: str = ""


def plain(data: Any) -> dict[str, Any]:
    """A dataclass of this module as what `json.loads` would give."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(data), allow_nan=False))
    return found


def parsed(kind: type[T], data: Any, where: str) -> T:
    """A dataclass of this module from plain data, every type checked; FormatError names the key that is wrong."""
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
