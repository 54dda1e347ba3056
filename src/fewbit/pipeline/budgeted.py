"""Makes a plan whose output has the size that was asked for: each weight gets a width of its own.

The size is counted as the user asked: bits of quantized weights (`bits`), bytes in files (`size`), or bytes in memory
(`fit`). Only the quantized weights have a choice. For what headers and the record of a file take, an upper bound is
counted, because the record is written last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from fewbit import units
from fewbit.errors import PlanError
from fewbit.formats.containers import gguf
from fewbit.models.gguf.header import Header
from fewbit.nn.choose import expected
from fewbit.pipeline import costs, sizes, write_gguf
from fewbit.pipeline.capture import Inputs
from fewbit.pipeline.costs import Costs, Told
from fewbit.pipeline.job import Job
from fewbit.pipeline.run import fingerprint
from fewbit.pipeline.settled import Settled
from fewbit.plans import allocation
from fewbit.plans.allocation import Option, Unit
from fewbit.plans.budget import Allocation, Budget, Point
from fewbit.schemes.base import Scheme, parse
from fewbit.system import machine

_POINTS = 12  # of the curve
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
        settled = job.settled
        assignments = settled.resolved.assignments.values()
        made = cls(settled, costs.widths(settled), budget, 0, 0)
        if budget.bits is not None:
            fixed, limit = 0, int(budget.bits * made.weights / 8)
        elif budget.size is not None:
            fixed, limit = made.unquantized + _headers(job, header), int(budget.size)
        else:
            assert budget.fit is not None
            packed = sum(a.scheme.nbytes(a.shape) for a in assignments)
            fixed, limit = sizes.in_memory(settled) - packed + beside, int(budget.fit)
        made = replace(made, fixed=fixed, room=limit - fixed)
        least = sum(min(made.counted(module, scheme) for scheme in each) for module, each in made.widths.items())
        if least > made.room:
            raise PlanError(
                f"{budget} is too small: the smallest output of plan {settled.resolved.plan.name} takes "
                f"{made.said(least)}",
                "Give more, or use another plan or format.",
            )
        return made

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

    def point(self, schemes: Mapping[str, str], kl: float) -> Point:
        """The size and the loss if each module has its scheme."""
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
        )


def chosen(job: Job, choice: Choice, tokens: Tensor, tell: Told) -> tuple[Job, Allocation]:
    """The job with the plan whose output has the size of the budget at the least predicted loss.

    tokens: calibration windows. The second value says what was chosen.
    """
    found = costs.cached(
        job.settled,
        choice.widths,
        fingerprint(job.settled, Inputs(tokens, job.importance), machine.versions()),
        lambda: costs.measured(job.settled, choice.widths, tokens, job.importance, tell),
    )
    every = choice.units(found)
    plain = [unit for unit, _ in every]

    def spread(options: Sequence[Option]) -> tuple[dict[str, str], float]:
        schemes = {m: option.scheme for option, (_, modules) in zip(options, every, strict=True) for m in modules}
        return schemes, sum(option.loss for option in options)

    schemes, kl = spread(allocation.allocate(plain, choice.room))
    here = replace(choice.point(schemes, kl), chosen=True)
    low, high = allocation.smallest(plain), allocation.largest(plain)
    points = [
        choice.point(*spread(allocation.allocate(plain, low + (high - low) * i // (_POINTS - 1))))
        for i in range(_POINTS)
    ]
    for kind in dict.fromkeys(option.scheme for unit in plain for option in unit.options):
        same = [next((o for o in unit.options if o.scheme == kind), None) for unit in plain]
        if all(option is not None for option in same):
            points.append(choice.point(*spread([option for option in same if option is not None])))
    notes = []
    if choice.room > high:
        notes.append(f"{choice.budget} is above the largest output, which takes {choice.said(high)}: that one is made")
    if slow := sorted({scheme for module, scheme in schemes.items() if _slow(job.settled, module, scheme)}):
        notes.append(f"fewbit has no fast kernel for {', '.join(slow)}: other runtimes run this output faster")
    resolved = job.settled.resolved
    plan = allocation.planned(resolved.plan, schemes, resolved.kept)
    plan = replace(plan, name=f"{plan.name} with {str(choice.budget).strip('`').replace('=', ' ')}")
    settled = Settled.of(job.settled.skeleton, plan)
    settled.check_plan()
    before = job.settled.on_the_source()
    kept = [note for note in job.notes if note not in before]
    counts: dict[str, int] = {}
    for scheme in schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    done = Allocation(
        asked=str(choice.budget).strip("`"),
        kl=kl,
        bits=here.bits,
        output_bytes=here.output_bytes,
        schemes=dict(sorted(counts.items(), key=lambda each: -each[1])),
        tokens=found.tokens,
        curve=tuple(sorted({here, *(p for p in points if replace(p, chosen=True) != here)}, key=_by_size)),
        notes=tuple(notes),
    )
    return replace(job, settled=settled, notes=[*kept, *settled.on_the_source(), *notes]), done


def _slow(settled: Settled, module: str, scheme: str) -> bool:
    """Whether only the reference kernel multiplies by such a weight."""
    shape, device = settled.resolved.assignments[module].shape, torch.device(settled.skeleton.device)
    return expected(parse(scheme), shape, device, torch.bfloat16, here=False) == "reference"


def _by_size(point: Point) -> tuple[float, float]:
    return point.bits, point.kl


def _in_file(settled: Settled, shape: tuple[int, int], scheme: Scheme) -> int:
    return sum(spec.nbytes for spec in settled.resolved.format.specs(shape, scheme).values())


def _headers(job: Job, header: Header | None) -> int:
    """At most so many bytes of the weight files are no tensors."""
    settled = job.settled
    assignments = settled.resolved.assignments
    if header is None:
        parts = {m: len(settled.resolved.format.specs(a.shape, a.scheme)) for m, a in assignments.items()}
        rows, _ = sizes.tensors(settled)
        return 4096 + sum((len(name) + _ENTRY) * parts.get(name.removesuffix(".weight"), 1) for name, _, _ in rows)
    entries = [each.entry for each in write_gguf.planned(settled)]
    entries += [gguf.Entry(name, "f32", tuple(tensor.shape)) for name, tensor in header.extra.items()]
    longest: dict[str, Any] = {"left_out": "x" * (_RECORD + _REPORT * len(assignments))}
    _, _, whole = gguf.layout(write_gguf.metadata(header, settled.resolved, longest), entries, gguf.ALIGNMENT)
    padding = gguf.ALIGNMENT * len(entries)  # of other widths
    return whole - sum(entry.spec.nbytes for entry in entries) + padding
