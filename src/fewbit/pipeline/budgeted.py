"""Makes a plan whose output has the size that was asked for: each weight gets a width of its own.

The size is counted as the user asked: bits of quantized weights (`bits`), bytes in files (`size`), or bytes in memory
(`fit`). Only the quantized weights have a choice. Headers and the record of a file count with an upper bound, because
the record is written last.

The sum of costs underestimates the loss. So two other allocations, which depend on the model and the plan alone, are
quantized and measured on held-out windows, and `plans/correction.py` corrects the sum by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit import units
from fewbit.errors import PlanError
from fewbit.formats.containers import gguf
from fewbit.models.gguf.header import Header
from fewbit.nn.choose import expected
from fewbit.pipeline import costs, sizes, write_gguf
from fewbit.pipeline.blocks import quantize_blocks
from fewbit.pipeline.capture import Inputs
from fewbit.pipeline.costs import Costs
from fewbit.pipeline.divergence import divergence
from fewbit.pipeline.job import Job
from fewbit.pipeline.progress import Progress, Step
from fewbit.pipeline.run import Run, fingerprint
from fewbit.pipeline.settled import Settled
from fewbit.plans import allocation
from fewbit.plans.allocation import Option, Unit
from fewbit.plans.budget import Allocation, Budget, Point
from fewbit.plans.correction import Correction
from fewbit.schemes.base import Scheme, parse
from fewbit.system import machine, ranks
from fewbit.texts.windows import digest

_POINTS = 12  # of the curve
_MEASURED = 1 / 24, 1 / 3  # allocations that are measured: shares of the way from the fewest bytes to the most
_ENTRY = 160  # bytes of a tensor in the header of a safetensors file, beyond its name
_REPORT, _RECORD = 700, 20_000  # bytes of a weight in the record, and of the rest of the record


@dataclass(frozen=True)
class Choice:
    """What a plan may choose: the widths of each weight, and the bytes that `budget` leaves for all of them (`room`).

    fixed: the bytes that the budget counts besides.
    """

    settled: Settled
    widths: Mapping[str, Sequence[Scheme]]
    budget: Budget
    fixed: int
    room: int

    @classmethod
    def of(cls, job: Job, budget: Budget, header: Header | None, beside: int) -> Choice:
        """PlanError, before any work, if the smallest output is above the budget.

        beside: with `fit`, the bytes of everything in memory besides weights.
        """
        if budget.fit is not None:
            return cls.to_fit(job.settled, budget, beside)
        made = cls(job.settled, costs.widths(job.settled), budget, 0, 0)
        if budget.bits is not None:
            return made._within(0, int(budget.bits * made.weights / 8))
        assert budget.size is not None
        return made._within(made.unquantized + _headers(job, header), int(budget.size))

    @classmethod
    def to_fit(cls, settled: Settled, budget: Budget, beside: int) -> Choice:
        """As `of`, with a budget of memory. The weights need not be there."""
        assert budget.fit is not None
        packed = sum(a.scheme.nbytes(a.shape) for a in settled.resolved.assignments.values())
        made = cls(settled, costs.widths(settled), budget, 0, 0)
        return made._within(sizes.in_memory(settled) - packed + beside, int(budget.fit))

    def _within(self, fixed: int, limit: int) -> Choice:
        made = replace(self, fixed=fixed, room=limit - fixed)
        least, _ = made._ends
        if least > made.room:
            raise PlanError(
                f"{self.budget} is too small: the smallest output of plan {self.settled.resolved.plan.name} takes "
                f"{made.said(least)}",
                "Give more, or use another plan or format.",
            )
        return made

    @property
    def _ends(self) -> tuple[int, int]:
        """The bytes of all weights at their smallest and at their largest widths."""
        every = [[self.counted(module, scheme) for scheme in each] for module, each in self.widths.items()]
        return sum(map(min, every)), sum(map(max, every))

    @property
    def filled(self) -> float:
        """The bits of a quantized weight that use all of the room, at most those of the largest widths."""
        return 8 * min(self.room, self._ends[1]) / self.weights

    def counted(self, module: str, scheme: Scheme) -> int:
        """The bytes of one weight with a scheme, as the budget counts."""
        shape = self.settled.resolved.assignments[module].shape
        return _in_file(self.settled, shape, scheme) if self.budget.size is not None else scheme.nbytes(shape)

    def said(self, nbytes: int) -> str:
        """A size of the quantized weights, as the budget counts."""
        if self.budget.bits is not None:
            return f"{8 * nbytes / self.weights:.3f} bits per weight"
        return f"{units.size(nbytes + self.fixed)} ({nbytes + self.fixed:,} bytes)"

    @cached_property
    def unquantized(self) -> int:
        """Bytes in files of the tensors that are not quantized."""
        own = sum(_in_file(self.settled, a.shape, a.scheme) for a in self.settled.resolved.assignments.values())
        return sizes.tensors(self.settled)[1] - own

    @cached_property
    def weights(self) -> int:
        return sum(prod(a.shape) for a in self.settled.resolved.assignments.values())

    def units(self, found: Costs) -> list[tuple[Unit, list[str]]]:
        """The units with their options, and the modules of each."""
        members: dict[str, list[str]] = {}
        for module in self.widths:
            members.setdefault(found.units.get(module, module), []).append(module)
        every = []
        for name, modules in members.items():
            common = [s for s in self.widths[modules[0]] if all(s in self.widths[module] for module in modules[1:])]
            options = [
                Option(
                    str(scheme),
                    sum(self.counted(module, scheme) for module in modules),
                    sum(found.of.get(module, {}).get(str(scheme), 0.0) for module in modules),
                )
                for scheme in common
            ]
            every.append((Unit(name, tuple(options)), modules))
        return every

    def point(self, schemes: Mapping[str, str], kl: float, total: float) -> Point:
        """The size and the loss if each module has its scheme. total: the sum of their costs."""
        assignments = self.settled.resolved.assignments
        of = {module: {str(scheme): scheme for scheme in self.widths[module]} for module in schemes}
        chosen = {module: of[module][scheme] for module, scheme in schemes.items()}
        packed = sum(scheme.nbytes(assignments[module].shape) for module, scheme in chosen.items())
        files = sum(_in_file(self.settled, assignments[module].shape, scheme) for module, scheme in chosen.items())
        kinds = set(schemes.values())
        return Point(
            8 * packed / self.weights,
            self.unquantized + files,
            kl,
            kinds.pop() if len(kinds) == 1 else "",
            costs=total,
        )


class Told(Protocol):
    """Called when `done` of `total` steps are done. what: what is counted, unless it is the costs."""

    def __call__(self, done: int, total: int, *, what: str = "") -> None: ...


@dataclass(frozen=True)
class Texts:
    """inputs: what the measured allocations are quantized with, as many windows as costs are measured on. windows:
    calibration windows of token ids [n, length]. held_out: those that the allocations are measured on."""

    inputs: Inputs
    windows: Tensor
    held_out: Tensor


def chosen(job: Job, choice: Choice, texts: Texts, tell: Told) -> tuple[Job, Allocation]:
    """The job with the plan whose output has the size of the budget at the least predicted loss.

    The second value says what was chosen. PlanError if there are several processes.
    """
    if ranks.size() > 1:
        raise PlanError(
            "widths are chosen by one process",
            "Run once without torchrun and with `--dry-run --json`, and give its plan to the processes.",
        )
    found = costs.cached(
        choice.widths,
        fingerprint(job.settled, Inputs(texts.windows, job.importance), machine.versions()),
        job.source.name,
        lambda: costs.measured(job.settled, choice.widths, texts.windows, job.importance, tell),
    )
    every = choice.units(found)
    plain = [unit for unit, _ in every]
    measured = _measured(job, choice, found, texts, tell)
    correction = Correction.of([(point.costs, point.measured or 0.0) for point in measured])

    def point(schemes: Mapping[str, str], total: float) -> Point:
        return choice.point(schemes, correction(total), total)

    schemes, total = _spread(every, allocation.allocate(plain, choice.room))
    here = replace(point(schemes, total), chosen=True)
    low, high = allocation.smallest(plain), allocation.largest(plain)
    points = [
        point(*_spread(every, allocation.allocate(plain, low + (high - low) * i // (_POINTS - 1))))
        for i in range(_POINTS)
    ]
    for kind in dict.fromkeys(option.scheme for unit in plain for option in unit.options):
        same = [next((o for o in unit.options if o.scheme == kind), None) for unit in plain]
        if all(option is not None for option in same):
            points.append(point(*_spread(every, [option for option in same if option is not None])))
    notes = []
    if choice.room > high:
        notes.append(f"{choice.budget} is above the largest output, which takes {choice.said(high)}: that one is made")
    if slow := sorted({scheme for module, scheme in schemes.items() if _slow(job.settled, module, scheme)}):
        notes.append(f"fewbit has no fast kernel for {', '.join(slow)}: other runtimes run this output faster")
    settled = _settled(job, schemes, str(choice.budget).strip("`").replace("=", " "))
    before = job.settled.on_the_source()
    kept = [note for note in job.notes if note not in before]
    counts: dict[str, int] = {}
    for scheme in schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    done = Allocation(
        asked=str(choice.budget).strip("`"),
        kl=here.kl,
        bits=here.bits,
        output_bytes=here.output_bytes,
        schemes=dict(sorted(counts.items(), key=lambda each: -each[1])),
        tokens=found.tokens,
        curve=_curve(here, [replace(each, kl=correction(each.costs)) for each in measured], points),
        notes=tuple(notes),
        costs=total,
        factor=correction.factor,
        exponent=correction.exponent,
        least=correction.least,
        held_out=texts.held_out.numel(),
    )
    return replace(job, settled=settled, notes=[*kept, *settled.on_the_source(), *notes]), done


def _measured(job: Job, choice: Choice, found: Costs, texts: Texts, tell: Told) -> list[Point]:
    """Allocations at `_MEASURED`, quantized as an output is and measured on the held-out windows.

    They depend on the model and the plan alone, and are kept in the cache: another size needs no second measurement.
    """
    every = replace(choice, budget=Budget(bits=1.0)).units(found)
    plain = [unit for unit, _ in every]
    low, high = allocation.smallest(plain), allocation.largest(plain)
    points: dict[int, Point] = {}
    for number, share in enumerate(_MEASURED, 1):
        schemes, total = _spread(every, allocation.allocate(plain, low + int((high - low) * share)))
        settled = _settled(job, schemes, "")
        known = fingerprint(settled, texts.inputs, machine.versions())

        def told(step: Step, output: str = f"output {number} of {len(_MEASURED)} to measure") -> None:
            tell(step.done, step.total, what=f"{step.what}, {output}")

        def measure(settled: Settled = settled, known: str = known, told: Progress = told) -> float:
            with Run(known, job.source.name, "blocks quantized to measure a choice of widths") as run:
                quantize_blocks(settled, texts.inputs, run, told)
                kl = divergence(settled, run, texts.held_out)
                run.forget()
            return kl

        kl = costs.kept(f"{known} {digest(texts.held_out)}", job.source.name, measure)
        point = choice.point(schemes, 0.0, total)
        points[point.output_bytes] = replace(point, measured=kl)
    return list(points.values())


def _spread(every: Sequence[tuple[Unit, list[str]]], options: Sequence[Option]) -> tuple[dict[str, str], float]:
    """Module -> its scheme, if each unit has its option; and the sum of costs."""
    schemes = {m: option.scheme for option, (_, modules) in zip(options, every, strict=True) for m in modules}
    return schemes, sum(option.loss for option in options)


def _settled(job: Job, schemes: Mapping[str, str], said: str) -> Settled:
    """The job's plan with these schemes. said: what its name says of them."""
    resolved = job.settled.resolved
    plan = allocation.planned(resolved.plan, schemes, resolved.kept, job.settled.packed_head)
    settled = Settled.of(job.settled.skeleton, replace(plan, name=f"{plan.name} with {said}"))
    settled.check_plan()
    return settled


def _curve(here: Point, measured: Sequence[Point], points: Sequence[Point]) -> tuple[Point, ...]:
    """All points by size, each once: those that say the most come first."""
    found: dict[tuple[float, int, float], Point] = {}
    for point in (here, *measured, *points):
        key = point.bits, point.output_bytes, point.costs
        have = found.setdefault(key, point)
        found[key] = replace(have, measured=have.measured if have.measured is not None else point.measured)
    return tuple(sorted(found.values(), key=_by_size))


def _slow(settled: Settled, module: str, scheme: str) -> bool:
    """Whether only the reference kernel multiplies by such a weight."""
    shape, device = settled.resolved.assignments[module].shape, torch.device(settled.skeleton.device)
    return expected(parse(scheme), shape, device, torch.bfloat16, here=False) == "reference"


def _by_size(point: Point) -> tuple[float, float]:
    return point.bits, point.kl


def _in_file(settled: Settled, shape: tuple[int, int], scheme: Scheme) -> int:
    return sum(spec.nbytes for spec in settled.resolved.format.specs(shape, scheme).values())


def _headers(job: Job, header: Header | None) -> int:
    """An upper bound of the bytes of the weight files beside tensors: headers, names and the record."""
    settled = job.settled
    assignments = settled.resolved.assignments
    if header is None:
        parts = {m: len(settled.resolved.format.specs(a.shape, a.scheme)) for m, a in assignments.items()}
        rows, _ = sizes.tensors(settled)
        return 4096 + sum((len(name) + _ENTRY) * parts.get(name.removesuffix(".weight"), 1) for name, _, _ in rows)
    entries = [each.entry for each in write_gguf.planned(settled)]
    entries += header.extra_entries
    longest: dict[str, Any] = {"left_out": "x" * (_RECORD + _REPORT * len(assignments))}
    _, _, whole = gguf.layout(write_gguf.metadata(header, settled.resolved, longest), entries, gguf.ALIGNMENT)
    padding = gguf.ALIGNMENT * len(entries)  # of other widths
    return whole - sum(entry.spec.nbytes for entry in entries) + padding
