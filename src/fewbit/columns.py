"""The columns of the report's table: what each says of a row, how it is written, and which end of it is the better one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fewbit import report
from fewbit.comparison import Interval, Peak, Row, Timing


@dataclass(frozen=True)
class Column:
    """`value` is None where a row has none; `under` is a smaller line below it; `more_is_better` is None where neither is."""

    group: str
    name: str
    title: str
    explained: str
    value: Callable[[Row], float | None]
    write: Callable[[float], str]
    under: Callable[[Row], str | None] = lambda row: None
    more_is_better: bool | None = False

    def best(self, rows: Sequence[Row]) -> float | None:
        """The best value of the rows, None where it says nothing: no better end, or fewer than two rows."""
        values = [v for row in rows if (v := self.value(row)) is not None]
        if self.more_is_better is None or len(values) < 2:
            return None
        return max(values) if self.more_is_better else min(values)


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns in which at least one of the rows has something."""
    return [column for column in _all() if any(column.value(row) is not None for row in rows)]


def rate(value: float) -> str:
    """Tokens a second: three digits where there are more before the point than after it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def nats(value: float) -> str:
    """Four decimals, so that a column can be compared at a glance; more where they would hide what there is."""
    return f"{value:.4f}" if value >= 0.01 else f"{value:.3g}"


def _all() -> Iterator[Column]:
    yield Column(
        "Quality", "kl", "KL divergence", "mean distance from the original's predictions, nats per token; 0 is no loss",
        lambda r: r.loss and r.loss.kl.value, nats, lambda r: _between(r.loss and r.loss.kl, nats),
    )  # fmt: skip
    yield Column(
        "Quality", "perplexity", "perplexity", "how surprised it is by the text",
        lambda r: r.loss and r.loss.perplexity.value, "{:.2f}".format,
        lambda r: _between(r.loss and r.loss.perplexity, "{:.2f}".format),
    )  # fmt: skip
    yield Column(
        "Quality", "same-top", "same token", "how often both would choose the same next token",
        lambda r: r.loss and r.loss.same_top.value, report.share,
        lambda r: _between(r.loss and r.loss.same_top, report.share), more_is_better=True,
    )  # fmt: skip
    yield Column("Size", "disk", "on disk", "bytes of the weight files", lambda r: r.disk_bytes, report.size)
    yield Column(
        "Size", "bits", "bits per weight", "over the whole model", lambda r: r.bits_per_weight, "{:.2f}".format
    )
    yield Column(
        "Size", "at-rest", "at rest", "every parameter and buffer of the loaded model, tied ones once",
        lambda r: r.weights and r.weights.at_rest, report.size, _parameters,
    )  # fmt: skip
    yield Column("Speed", "load", "load", "until it is ready", lambda r: r.speed and r.speed.load, report.duration)
    yield Column(
        "Speed", "prefill", "prefill tok/s", "tokens of a prompt read a second, median",
        lambda r: r.speed and r.speed.prefill.median, rate, lambda r: _spread(r.speed and r.speed.prefill),
        more_is_better=True,
    )  # fmt: skip
    yield Column(
        "Speed", "decode", "decode tok/s", "tokens written a second, median",
        lambda r: r.speed and r.speed.decode.median, rate, lambda r: _spread(r.speed and r.speed.decode),
        more_is_better=True,
    )  # fmt: skip
    for name, title, explained in (
        ("loading", "peak loading", "the most memory ever resident while it was loaded; below, what came on top"),
        ("generating", "peak generating", "the most memory ever resident while it wrote; below, what came on top"),
    ):
        yield Column(
            "Memory", name, title, explained, _process(name), report.size, _growth(name)
        )
    for name, title, explained in (
        ("loading", "GPU loading", "the most that the allocator held"),
        ("generating", "GPU generating", "the most that the allocator held"),
    ):
        yield Column("Memory", f"cuda-{name}", title, explained, _cuda(name), report.size)
    yield Column(
        "Quantizing", "seconds", "time", "to make it, what was written checked too",
        lambda r: r.quantizing and r.quantizing.seconds, report.duration,
    )  # fmt: skip
    yield Column(
        "Quantizing", "quantizing-peak", "peak", "the most memory ever resident; below, what came on top",
        lambda r: r.quantizing and r.quantizing.peak.process, report.size,
        lambda r: r.quantizing and f"+ {report.size(r.quantizing.peak.growth)}",
    )  # fmt: skip


def _between(interval: Interval | None, write: Callable[[float], str]) -> str | None:
    return f"{write(interval.low)} – {write(interval.high)}" if interval and interval.high > interval.low else None


def _spread(timing: Timing | None) -> str | None:
    return f"{rate(timing.low)} – {rate(timing.high)}" if timing and timing.high > timing.low else None


def _parameters(row: Row) -> str | None:
    """What `sum(p.numel() * p.element_size() for p in model.parameters())` says, where that shows as another number."""
    if row.weights is None or report.size(row.weights.parameters) == report.size(row.weights.at_rest):
        return None
    return f"parameters {report.size(row.weights.parameters)}"


def _peak(row: Row, name: str) -> Peak | None:
    return row.loading if name == "loading" else row.generating


def _process(name: str) -> Callable[[Row], float | None]:
    return lambda row: (peak := _peak(row, name)) and peak.process


def _growth(name: str) -> Callable[[Row], str | None]:
    return lambda row: (peak := _peak(row, name)) and f"+ {report.size(peak.growth)}"


def _cuda(name: str) -> Callable[[Row], float | None]:
    return lambda row: (peak.cuda or None) if (peak := _peak(row, name)) else None
