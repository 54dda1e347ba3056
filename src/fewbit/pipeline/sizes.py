"""Exact sizes of a plan's output, computed from shapes alone.

`tensors` lists every tensor of an output; `quantize` fails if it wrote a different number of bytes. Bytes in memory are
those of the canonical parts of a loaded model. A file may hold slightly more (levels, JSON, `g_idx`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from fewbit.errors import FewbitError
from fewbit.methods.base import name_of
from fewbit.models import blocks
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline import write_gguf
from fewbit.pipeline.settled import Settled
from fewbit.plans import plan as plans
from fewbit.plans.plan import Assignment
from fewbit.stats import Need


@dataclass(frozen=True)
class Sized:
    """The sizes of one plan for one model. All bytes are exact.

    `file_bytes`: all tensors in the files. `weights_bytes`: all tensors in memory. `packed_bytes`: quantized weights in
    memory. `bits`: bits per quantized weight. `share`: share of the blocks' parameters that are quantized.
    `need`: the most that it gathers of a calibration text. `schemes`: the schemes used, the one with the most weights
    first. `why_not`: why the plan does not fit the model; then all numbers are 0.
    """

    plan: str
    format: str
    file_bytes: int = 0
    weights_bytes: int = 0
    packed_bytes: int = 0
    bits: float = 0.0
    share: float = 0.0
    need: Need = Need.NOTHING
    schemes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    why_not: str | None = None


def _by_method(assignment: Assignment) -> str:
    return f"{assignment.scheme}, {name_of(assignment.method)}"


def tensors(
    settled: Settled, described: Callable[[Assignment], str] = _by_method
) -> tuple[list[tuple[str, str, int]], int]:
    """Every tensor of the output as (name, description, bytes), and the total bytes of the files' tensors.

    described: the description of a quantized weight.
    """
    skeleton, format, assignments = settled.skeleton, settled.resolved.format, settled.resolved.assignments
    rows: list[tuple[str, str, int]] = []
    if format.suffix:
        for each in write_gguf.planned(settled):
            what = described(assignments[each.module]) if each.module else each.entry.type
            rows.append((each.entry.name, what, each.entry.spec.nbytes))
        return rows, write_gguf.nbytes(settled)
    for _, name, spec in skeleton.passed_through({f"{module}.weight" for module in assignments}):
        assignment = assignments.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if assignment is not None:
            what = described(assignment)
            size = sum(s.nbytes for s in format.specs(assignment.shape, assignment.scheme).values())
        else:
            what, size = f"unquantized ({str(spec.dtype).removeprefix('torch.')})", spec.nbytes
        rows.append((name, what, size))
    for key, spec in skeleton.carried(assignments).items():
        what = f"copied, not part of the model ({str(spec.dtype).removeprefix('torch.')})"
        rows.append((key, what, spec.nbytes))
    return rows, sum(size for _, _, size in rows)


def unquantized(settled: Settled) -> dict[str, int]:
    """Kind of weights that a folder has unquantized -> their bytes. Empty for a GGUF file."""
    if settled.resolved.format.suffix:
        return {}
    skeleton, assignments, found = settled.skeleton, settled.resolved.assignments, dict[str, int]()
    model, towers = skeleton.model, blocks.towers(skeleton.model)
    ends = [each for each in (blocks.embedding_of(model), model.get_output_embeddings()) if each is not None]
    outside = {name for name, module in model.named_modules() if any(module is each for each in ends)}
    both = "embeddings" if settled.packed_head else "embeddings and head"
    for _, name, spec in skeleton.passed_through({f"{module}.weight" for module in assignments}):
        if (module := name.removesuffix(".weight")) not in assignments:
            kind = "towers" if name.startswith(towers) else both if module in outside else "others"
            found[kind] = found.get(kind, 0) + spec.nbytes
    return found


def sized(skeleton: Skeleton, plan: plans.Plan) -> Sized:
    """The sizes of `plan` for a model, or why the plan does not fit it (`why_not`)."""
    try:
        if reason := skeleton.why_not():
            return Sized(plan.name, plan.format, why_not=reason)
        settled = Settled.of(skeleton, plan)
        _, file_bytes = tensors(settled)
    except FewbitError as error:
        return Sized(plan.name, plan.format, why_not=error.message)
    resolved = settled.resolved
    assignments = resolved.assignments
    packed = {module: a.scheme.nbytes(a.shape) for module, a in assignments.items()}
    counts: dict[str, int] = {}
    for a in assignments.values():
        counts[str(a.scheme)] = counts.get(str(a.scheme), 0) + prod(a.shape)
    return Sized(
        plan=plan.name,
        format=resolved.format.name,
        file_bytes=file_bytes,
        weights_bytes=in_memory(settled),
        packed_bytes=sum(packed.values()),
        bits=8 * sum(packed.values()) / sum(counts.values()),
        share=settled.share,
        need=settled.need,
        schemes=tuple(sorted(counts, key=lambda s: -counts[s])),
        notes=resolved.notes,
    )


def in_memory(settled: Settled) -> int:
    """Bytes of all tensors in memory. GGUF weights have the same bytes there as in the file."""
    assignments = settled.resolved.assignments
    if settled.resolved.format.suffix:
        return tensors(settled)[1]
    whole = {f"{module}.weight" for module in assignments}
    rest = (s for _, n, s in settled.skeleton.passed_through(whole) if n.removesuffix(".weight") not in assignments)
    return sum(a.scheme.nbytes(a.shape) for a in assignments.values()) + sum(spec.nbytes for spec in rest)


def original_bytes(skeleton: Skeleton) -> int:
    """Bytes of the unquantized model, tied tensors counted once."""
    found = ((key, spec) for key, name, spec in skeleton.passed_through() if name != skeleton.untied)
    return sum(skeleton.multiplied.get(key, spec).nbytes for key, spec in found)


def checkpoint_bytes(skeleton: Skeleton) -> int:
    """Bytes of the model in its files, with the checkpoint tensors that its class has no place for."""
    if skeleton.packing is not None:
        return skeleton.packing.file_bytes
    return original_bytes(skeleton) + sum(skeleton.checkpoint.specs[key].nbytes for key in skeleton.without_place)
