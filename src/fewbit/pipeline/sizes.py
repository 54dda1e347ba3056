"""What a plan makes of a model, to the byte, from shapes alone.

`tensors` is the one account of an output: `quantize` fails if it wrote another number of bytes. Bytes at rest are those
of the canonical parts, which is what a loaded model holds: a file may have a little more (levels, JSON, `g_idx`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fewbit.errors import FewbitError
from fewbit.methods.base import name_of
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline import write_gguf
from fewbit.pipeline.settled import Settled
from fewbit.plans import plan as plans
from fewbit.stats import Need


@dataclass(frozen=True)
class Sized:
    """One plan for one model. Bytes are exact: `file_bytes` of all tensors in the files, `weights_bytes` of all in
    memory, of which `packed_bytes` are those of quantized weights.

    `bits`: bits per quantized weight. `why_not`: why the plan cannot be; then all numbers are 0. `calibrates`: whether
    it needs text. `schemes`: what the weights get, the commonest first.
    """

    plan: str
    format: str
    file_bytes: int = 0
    weights_bytes: int = 0
    packed_bytes: int = 0
    bits: float = 0.0
    share: float = 0.0
    calibrates: bool = False
    schemes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    why_not: str | None = None


def tensors(settled: Settled) -> tuple[list[tuple[str, str, int]], int]:
    """Every tensor of the output as (name, what it becomes, bytes), and the bytes of all that the files hold."""
    skeleton, format, wanted, found = settled.skeleton, settled.resolved.format, settled.resolved.assignments, []
    if format.suffix:
        for each in write_gguf.planned(settled):
            method = f", {name_of(wanted[each.module].method)}" if each.module else ""
            found.append((each.entry.name, each.entry.type + method, each.entry.spec.nbytes))
        return found, write_gguf.nbytes(settled)
    for _, name, spec in skeleton.passed_through():
        assignment = wanted.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if assignment is not None:
            what = f"{assignment.scheme}, {name_of(assignment.method)}"
            size = sum(s.nbytes for s in format.specs(assignment.shape, assignment.scheme).values())
        else:
            what, size = f"as it is ({str(spec.dtype).removeprefix('torch.')})", spec.nbytes
        found.append((name, what, size))
    for key, spec in skeleton.carried(wanted).items():
        what = f"as it is, no part of the model ({str(spec.dtype).removeprefix('torch.')})"
        found.append((key, what, spec.nbytes))
    return found, sum(size for _, _, size in found)


def sized(skeleton: Skeleton, plan: plans.Plan) -> Sized:
    """The sizes of `plan` for a model, or why it cannot be."""
    try:
        if reason := skeleton.why_not():
            return Sized(plan.name, plan.format, why_not=reason)
        settled = Settled.of(skeleton, plan)
        _, file_bytes = tensors(settled)
    except FewbitError as error:
        return Sized(plan.name, plan.format, why_not=error.message)
    resolved = settled.resolved
    wanted = resolved.assignments
    packed = {module: a.scheme.nbytes(a.shape) for module, a in wanted.items()}
    if resolved.format.suffix:
        weights = file_bytes  # blocks in memory are those of the file
    else:
        rest = (s for _, n, s in skeleton.passed_through() if n.removesuffix(".weight") not in wanted)
        weights = sum(packed.values()) + sum(spec.nbytes for spec in rest)
    counts: dict[str, int] = {}
    for a in wanted.values():
        counts[str(a.scheme)] = counts.get(str(a.scheme), 0) + prod(a.shape)
    return Sized(
        plan=plan.name,
        format=resolved.format.name,
        file_bytes=file_bytes,
        weights_bytes=weights,
        packed_bytes=sum(packed.values()),
        bits=8 * sum(packed.values()) / sum(counts.values()),
        share=settled.share,
        calibrates=settled.need > Need.NOTHING,
        schemes=tuple(sorted(counts, key=lambda s: -counts[s])),
        notes=resolved.notes,
    )


def original_bytes(skeleton: Skeleton) -> int:
    """Bytes of the model as it is, ties counted once."""
    return sum(spec.nbytes for _, _, spec in skeleton.passed_through())


def checkpoint_bytes(skeleton: Skeleton) -> int:
    """Bytes of the model as it is, and of the tensors of its files that it has no place for."""
    return original_bytes(skeleton) + sum(skeleton.checkpoint.specs[key].nbytes for key in skeleton.without_place)
