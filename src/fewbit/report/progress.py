"""Progress of the verbs: a bar in a terminal, one line that changes in a notebook, plain lines elsewhere.

The argument `progress` of a verb is one of:

- None, the default: show progress in a terminal and in a notebook. Elsewhere log it (logger `fewbit.progress`, INFO).
- True, the command line's default: show progress. Elsewhere print lines on stderr.
- False: show nothing.
- a function: call it with each step, and show nothing.

A verb that calls another one passes its argument on. The bars of a process share one display, because a terminal has
room for one: a bar that starts while another is shown, in an inner verb or in another thread, becomes one more line.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewbit.report import tables, text
from fewbit.system import ranks
from fewbit.units import duration

if TYPE_CHECKING:
    from fewbit.measure.comparison import Event
    from fewbit.pipeline.progress import Step

logger = logging.getLogger("fewbit.progress")


class Bar(Protocol):
    """Called to show that `done` of `total` steps are done; total 0: it is not known how many there are.

    state: what the last step says. found: so many of the last steps were read from a saved result. what: what is being
    counted.
    """

    def __call__(self, done: int, total: int, state: str = "", found: int = 0, what: str = "") -> None: ...


class Lines:
    """Progress as plain lines: for the first step, for the last, and now and then between them.

    Between them a line comes once `GAP` seconds have passed and a hundredth of the work was done since the last line.
    ends: whether the first and the last step have lines however quick they are.
    """

    GAP = 15.0

    def __init__(
        self,
        what: str,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
        ends: bool = True,
    ) -> None:
        self.what, self.write, self.clock, self.ends = what, write, clock, ends
        self.start = self.told_at = clock()
        self.told, self.found = 0, 0

    def __call__(self, done: int, total: int, state: str = "", found: int = 0, what: str = "") -> None:
        now = self.clock()
        if what and what != self.what:  # another phase of the work, which is timed anew
            self.what, self.start, self.told, self.found = what, now, 0, 0
        self.found += found
        due = now - self.told_at >= self.GAP and (done - self.told) * 100 >= total
        if not due and not (self.ends and (not self.told or done >= total)):
            return
        self.told, self.told_at = done, now
        # Steps that were read from saved results take no time, so they do not count in the estimate.
        spent, computed = now - self.start, done - self.found
        left = f", {duration(spent / computed * (total - done))} left" if computed > 0 and total else ""
        counted = f"{self.what} {_count(done, total)}".rstrip()
        self.write("  ".join(filter(None, (counted, state, f"{duration(spent)} elapsed{left}"))))


class _Screen:
    """The bars of a terminal, in one live display that exists while there are any."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._bars: Progress | None = None

    @contextmanager
    def bar(self, what: str) -> Iterator[Bar]:
        with self._lock:
            if self._bars is None:
                self._bars = _bars()
                self._bars.start()
            self._users += 1
            bars = self._bars
        task, counted = bars.add_task(what, total=None, count="", state=""), what

        def update(done: int, total: int, state: str = "", found: int = 0, what: str = "") -> None:
            nonlocal counted
            if what and what != counted:  # another phase of the work, which is timed anew
                counted = what
                bars.reset(task, description=what)
                bars.tasks[bars.task_ids.index(task)].total = None
            bars.update(task, total=total or None, completed=done, count=_count(done, total), state=state)

        try:
            yield update
        finally:
            bars.refresh()  # the last step too is seen
            bars.remove_task(task)
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._bars = None
                    bars.stop()


_screen = _Screen()


def _bars() -> Progress:
    what, count, state = (
        TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[count]", "fields[state]")
    )
    columns = what, BarColumn(24), count, state, TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=text.err, transient=True)


class _Cell:
    """Progress in a notebook: one line of the cell's output, which changes. It needs no widgets."""

    GAP = 0.1  # seconds between two changes: each is a message to the browser

    def __init__(self, what: str) -> None:
        display: Any = sys.modules["IPython.display"].display
        self.lines, self.shown_at = Lines(what, self._show), 0.0
        self.handle = display({"text/plain": what}, raw=True, display_id=True)

    def _show(self, line: str) -> None:
        self.handle.update({"text/plain": line}, raw=True)

    def __call__(self, done: int, total: int, state: str = "", found: int = 0, what: str = "") -> None:
        now = time.perf_counter()
        if (what and what != self.lines.what) or now - self.shown_at >= self.GAP or done >= total:
            self.shown_at = now
            self.lines.told = 0  # each line replaces the one before
        self.lines(done, total, state, found, what)


def _count(done: int, total: int) -> str:
    return f"{done}/{total}" if total else str(done or "")


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython in a terminal is none."""
    found = sys.modules.get("IPython")
    return getattr(found and found.get_ipython(), "kernel", None) is not None


def _watched() -> bool:
    """Whether stderr is a terminal that can move its cursor. FORCE_COLOR alone makes a log file none."""
    return text.err.is_interactive and text.err.file.isatty()


def _writer(progress: bool | None) -> Callable[[str], None]:
    """What takes plain lines: stderr if they were requested, else the logger. Under torchrun rank 0 writes for all."""
    if progress is False or ranks.silent():
        return lambda line: None
    return (lambda line: tables.verbatim(text.err, line)) if progress else lambda line: logger.info("%s", line)


@contextmanager
def _bar(what: str, progress: bool | None, ends: bool = True) -> Iterator[Bar]:
    if progress is False or ranks.silent():
        yield Lines(what, lambda line: None)
    elif _in_notebook():
        yield _Cell(what)
    elif _watched():
        with _screen.bar(what) as bar:
            yield bar
    else:
        yield Lines(what, _writer(progress), ends=ends)


@contextmanager
def blocks(progress: bool | Callable[[Step], None] | None) -> Iterator[Callable[[Step], None]]:
    """Progress over the blocks of a model."""
    if callable(progress):
        yield progress
        return
    with _bar("block", progress) as bar:

        def tell(step: Step) -> None:
            state = "" if step.error is None else f"output error {step.error:.2e}"
            if step.resumed:
                state = "found, from an interrupted run"
            if step.gain is not None and not step.resumed:
                state += f", tuned {-step.gain:+.1%}" if step.gain else ", not better by tuning"
            bar(step.done, step.total, state, step.resumed, step.what)

        yield tell


@contextmanager
def steps(progress: bool | Callable[[int, int, float], None] | None) -> Iterator[Callable[[int, int, float], None]]:
    """Progress over training steps."""
    if callable(progress):
        yield progress
        return
    with _bar("step", progress) as bar:
        yield lambda done, total, loss: bar(done, total, f"loss {loss:.4f}")


@contextmanager
def tuning(progress: bool | Callable[[int, int, float], None] | None) -> Iterator[Callable[[int, int, float], None]]:
    """Progress over the steps of `tune`, with the divergence on held-out text.

    The steps before the first call are those of an interrupted run.
    """
    if callable(progress):
        yield progress
        return
    with _bar("step", progress) as bar:
        begun = False

        def tell(done: int, total: int, kl: float) -> None:
            nonlocal begun
            found, begun = 0 if begun else done, True
            state = f"held-out KL {kl:.4g}" + ", found, from an interrupted run" * bool(found)
            bar(done, total, state, found)

        yield tell


@contextmanager
def windows(progress: bool | Callable[[int, int], None] | None) -> Iterator[Callable[[int, int], None]]:
    """Progress over windows of text."""
    if callable(progress):
        yield progress
        return
    with _bar("window", progress) as bar:
        yield bar


@contextmanager
def ranges(progress: bool | None) -> Iterator[Callable[[int, int], None]]:
    """Progress over the ranges of rows for which a GPU's kernels are measured."""
    with _bar("range of rows", progress) as bar:
        yield bar


@contextmanager
def costs(progress: bool | Callable[..., None] | None) -> Iterator[Callable[..., None]]:
    """Progress over the blocks of the model while their costs at each width are measured: forwards, then backwards.

    Then over those of outputs that are measured."""
    if callable(progress):
        yield lambda done, total, what="": None
        return
    with _bar("cost of each width", progress) as bar:
        yield bar


@contextmanager
def phase(what: str, progress: bool | Callable[..., None] | None) -> Iterator[None]:
    """Say that a phase of the work has begun, whose steps are not counted."""
    if callable(progress):
        yield
        return
    if not (_in_notebook() or _watched()):
        _writer(progress)(what)
    with _bar(what, progress, ends=False):
        yield


@contextmanager
def plans(progress: bool | Callable[[Event], None] | None) -> Iterator[Callable[[Event], None]]:
    """Progress over the plans of a comparison: a line for each finished plan, and what is being done."""
    if callable(progress):
        yield progress
        return
    write, live = _writer(progress), _in_notebook() or _watched()
    begun = set[tuple[int, str]]()
    with _bar("", progress, ends=False) as bar:

        def tell(event: Event) -> None:
            name = f"{event.number}/{event.total}  {event.plan:<10}  "
            if end := ended(event):
                (_above if live and progress is not False else write)(name + end)
                return
            if not live and (event.number, event.state) not in begun:
                begun.add((event.number, event.state))
                write(name + event.state)
            bar(event.done, event.of, what=name + " ".join(filter(None, (event.state, event.unit))))

        yield tell


def ended(event: Event) -> str:
    """How a plan ended; empty while it is running."""
    if event.state == "failed":
        return f"failed: {event.reason}"
    return {"done": f"done in {duration(event.seconds)}", "reused": "measured before"}.get(event.state, "")


def _above(line: str) -> None:
    """Print a line above the bars."""
    tables.say(text.err, line)
