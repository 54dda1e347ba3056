"""The columns of a comparison: the value that each shows, its format, and whether more is better.

The report page shows all of them; the table in a terminal shows some.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fewbit import units
from fewbit.measure.comparison import Loss, Peak, Quantizing, Row, Speed, Timing, Weights, leaders, winners
from fewbit.measure.intervals import Interval

T = TypeVar("T")
U = TypeVar("U")


def within(interval: Interval) -> str:
    """A value and half the width of its interval: .041±.003."""
    half = float(f"{(interval.high - interval.low) / 2:.1g}")
    if interval.value < 0.001:
        return f"{interval.value:.1e}±{half:.0e}".replace("e-0", "e-")
    digits = max(0, min(4, -math.floor(math.log10(half)))) if half else 4
    return re.sub(r"(?<!\d)0\.", ".", f"{interval.value:,.{digits}f}±{half:,.{digits}f}")


def percent(interval: Interval) -> str:
    """A share as a percentage, and half the width of its interval: 89.5±.4%."""
    return f"{within(Interval(*(100 * each for each in (interval.value, interval.low, interval.high))))}%"


@dataclass(frozen=True)
class Column:
    """A column of the report page, and of the table in a terminal.

    value: None if a row has none. under: the smaller line below it on the page. interval: decides which rows are the
    best; without it, for values that are measured once, none is. write_interval: the value with its interval, in a
    terminal.
    """

    group: str
    name: str
    title: str
    explained: str
    value: Callable[[Row], float | None]
    write: Callable[[float], str]
    under: Callable[[Row], str | None] = lambda row: None
    more_is_better: bool = False
    interval: Callable[[Row], Interval | None] | None = None
    write_interval: Callable[[Interval], str] = within

    def cell(self, row: Row) -> str:
        """The cell in a terminal: the value, with half the width of its interval if it has one."""
        value, interval = self.value(row), self.interval(row) if self.interval is not None else None
        if interval is not None and interval.high > interval.low:
            return self.write_interval(interval)
        return "" if value is None else self.write(value)

    def best(self, rows: Sequence[Row]) -> list[Row]:
        """The best rows. Empty if there is no choice, or if intervals do not separate them from the others."""
        if self.interval is None:
            return []
        return [rows[i] for i in winners([self.interval(row) for row in rows], more_is_better=self.more_is_better)]

    def first(self, rows: Sequence[Row]) -> list[Row]:
        """All rows that may be the best: one, or several with overlapping intervals."""
        if self.interval is None:
            return []
        return [rows[i] for i in leaders([self.interval(row) for row in rows], more_is_better=self.more_is_better)]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the page for which at least one row has a value."""
    return [column for column in _all() if any(column.value(row) is not None for row in rows)]


def in_terminal() -> list[Column]:
    """The columns of the table in a terminal."""
    by_name = {column.name: column for column in [*_all(), _PEAK]}
    return [by_name[name] for name in _IN_TERMINAL]


def rate(value: float) -> str:
    """Tokens per second: whole numbers from 100, three significant digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def nats(value: float) -> str:
    """Four decimals, so that a column is easy to compare; three significant digits for values below 0.01."""
    return f"{value:.4f}" if value >= 0.01 else f"{value:.3g}"


def _all() -> Iterator[Column]:
    of, rest, more = _of, " Python included; below, the growth during this step", True
    yield Column(
        "Quality",
        "kl",
        "KL divergence",
        "mean distance from the original's predictions, nats per token; 0 is no loss",
        of(_loss, lambda loss: loss.kl.value),
        nats,
        of(_loss, lambda loss: _between(loss.kl, nats)),
        interval=of(_loss, lambda loss: loss.kl),
    )
    yield Column(
        "Quality",
        "perplexity",
        "perplexity",
        "how well it predicts the text; lower is better",
        of(_loss, lambda loss: loss.perplexity.value),
        "{:.2f}".format,
        of(_loss, lambda loss: _between(loss.perplexity, "{:.2f}".format)),
        interval=of(_loss, lambda loss: loss.perplexity),
    )
    yield Column(
        "Quality",
        "same-top",
        "same top token",
        "share of tokens where the model and the original have the same most likely token",
        of(_loss, lambda loss: loss.same_top.value),
        units.share,
        of(_loss, lambda loss: _between(loss.same_top, units.share)),
        more,
        of(_loss, lambda loss: loss.same_top),
        percent,
    )
    disk = _disk
    yield Column("Size", "disk", "on disk", "the weight files", disk, units.size, interval=of(disk, Interval.exact))
    whole, bits = "bits per weight over the whole model", _bits
    yield Column("Size", "bits", "bits/weight", whole, bits, "{:.2f}".format, interval=of(bits, Interval.exact))
    explained = "every parameter and buffer of the loaded model, tied ones once; below, the sum over parameters"
    rest_bytes = of(_weights, lambda w: w.at_rest)
    exact = of(rest_bytes, Interval.exact)
    yield Column("Size", "at-rest", "at rest", explained, rest_bytes, units.size, _parameters, interval=exact)
    for name, what, peak in (
        ("loading", "while the model was loaded", _loading),
        ("generating", "while it generated", _generating),
    ):
        title, explained = f"peak {name}", f"peak memory {what},{rest}"
        yield Column("Memory", name, title, explained, of(peak, lambda p: p.process), units.size, of(peak, _growth))
        explained = f"peak memory of torch on GPUs {what}; below, by the driver's count, all processes included"
        in_torch, in_all = of(peak, lambda p: p.cuda or None), of(peak, _on_device)
        yield Column("Memory", f"gpu-{name}", f"GPU {name}", explained, in_torch, units.size, in_all)
    explained = (
        "memory that loading added to the process, on a CPU; below, its difference from the tensors at rest: code, "
        "buffers of kernels, and memory that the allocator keeps"
    )
    yield Column("Memory", "resident", "added by loading", explained, _resident, units.size, _resident_more)
    yield Column("Speed", "load", "load", "time until the model is ready", of(_speed, lambda s: s.load), units.duration)
    for name, what, timing in (
        ("prefill", "prompt tokens read per second", of(_speed, lambda s: s.prefill)),
        ("decode", "tokens generated per second", of(_speed, lambda s: s.decode)),
    ):
        explained = f"{what}, median of all runs; below, its 95 % interval, or the range of the runs if there are few"
        value, under = of(timing, lambda t: t.median), of(timing, _spread)
        yield Column(
            "Speed", name, f"{name} tok/s", explained, value, rate, under, more, of(timing, lambda t: t.interval)
        )
    explained = "time to quantize, including the check of the output"
    yield Column(
        "Quantizing", "seconds", "quantized in", explained, of(_quantizing, lambda q: q.seconds), units.duration
    )
    value, under = of(_quantizing, lambda q: q.peak.process), of(_quantizing, lambda q: _growth(q.peak))
    yield Column("Quantizing", "quantizing", "peak", f"peak memory of quantizing,{rest}", value, units.size, under)


def peak(row: Row) -> int | None:
    """Peak memory of loading and generating: on the GPUs if the model was there, else of the process."""
    peaks = [p for p in (row.loading, row.generating) if p is not None]
    return max((p.cuda for p in peaks), default=0) or max((p.process for p in peaks), default=None)


_PEAK = Column("Memory", "peak", "peak memory", "the peak of loading and generating", peak, units.size)
_IN_TERMINAL = ("disk", "at-rest", "peak", "load", "prefill", "decode", "perplexity", "kl", "same-top", "seconds")


def _of(get: Callable[[Row], T | None], read: Callable[[T], U | None]) -> Callable[[Row], U | None]:
    """A function that applies `read` to a part of a row. It returns None if the row does not have that part."""
    return lambda row: None if (part := get(row)) is None else read(part)


def _disk(row: Row) -> int | None:
    return row.disk_bytes


def _bits(row: Row) -> float | None:
    return row.bits_per_weight


def _loss(row: Row) -> Loss | None:
    return row.loss


def _weights(row: Row) -> Weights | None:
    return row.weights


def _speed(row: Row) -> Speed | None:
    return row.speed


def _loading(row: Row) -> Peak | None:
    return row.loading


def _generating(row: Row) -> Peak | None:
    return row.generating


def _quantizing(row: Row) -> Quantizing | None:
    return row.quantizing


def _between(interval: Interval, write: Callable[[float], str]) -> str | None:
    return f"{write(interval.low)} – {write(interval.high)}" if interval.high > interval.low else None


def _spread(timing: Timing) -> str | None:
    if timing.interval is not None:
        return _between(timing.interval, rate)
    return f"{rate(timing.low)} – {rate(timing.high)}" if timing.high > timing.low else None


def _resident(row: Row) -> int | None:
    on_gpu = row.loading is not None and row.loading.cuda
    return row.weights.resident or None if row.weights is not None and not on_gpu else None


def _resident_more(row: Row) -> str | None:
    if row.weights is None or not row.weights.at_rest:
        return None
    more = row.weights.resident - row.weights.at_rest
    return f"at rest {'+' if more >= 0 else '−'} {units.size(abs(more))}"


def _on_device(peak: Peak) -> str | None:
    return f"{units.size(peak.device)} in all" if peak.device else None


def _growth(peak: Peak) -> str:
    return f"+ {units.size(peak.growth)}"


def _parameters(row: Row) -> str | None:
    """What summing over `model.parameters()` says, where that shows as another number."""
    if row.weights is None or units.size(row.weights.parameters) == units.size(row.weights.at_rest):
        return None
    return f"parameters {units.size(row.weights.parameters)}"
