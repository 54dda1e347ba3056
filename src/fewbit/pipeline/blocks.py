"""Block by block: capture what enters a block, quantize its weights, replay with the quantized ones, keep the result.

Memory holds one block in float, its statistics and the calibration activations, never the model. Each finished block
is a file in the run's cache folder, under a fingerprint of all that determines it, so a run that was killed goes on
where it stopped; the output is put together from those files at the end (write_folder.py, write_gguf.py).
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import KernelError, NumericsError
from fewbit.formats.base import Format
from fewbit.methods.base import Choice, Method, name_of
from fewbit.models.skeleton import BlockCall, Skeleton
from fewbit.pipeline.capture import Stages, captured, needs_of, staged, windows_at_once
from fewbit.pipeline.progress import Progress, Step
from fewbit.pipeline.rewrite import rewrite
from fewbit.pipeline.run import Importance, Run, TensorReport
from fewbit.pipeline.settled import calibration_need, outside, quantization_config
from fewbit.plans.plan import Assignment, Resolved
from fewbit.schemes.base import QTensor, Scheme, chunk_rows, vanished
from fewbit.stats import Need, Stats
from fewbit.system import ranks

_ROWS_OUTSIDE = {"cpu": 1 << 22}  # entries of embeddings or head worked on at a time


def quantize_blocks(
    skeleton: Skeleton,
    resolved: Resolved,
    tokens: Tensor | None,
    run: Run,
    progress: Progress,
    importance: Importance | None = None,
    *,
    stages: Stages | None = None,
    batch: int = 1,
) -> list[TensorReport]:
    """Fill `run` with every block, quantized, and with what is quantized besides them.

    `tokens` [samples, length] calibrate where a method needs it, unless `importance` says what they would. stages:
    linears of a block, by their names in it, of which each list sees the quantized values of those before; an empty one
    means those that read the same tensor, in the order in which they do; None: all see the block as it was. batch: how
    many windows at least are computed at once; where a GPU's memory does not suffice, half as many, after a warning,
    until KernelError says that one is too many.
    """
    count, length = (1, 1) if tokens is None else tokens.shape
    halved = 0
    while True:
        try:
            return _all_blocks(skeleton, resolved, tokens, run, progress, importance, stages, batch, halved)
        except torch.OutOfMemoryError as error:
            now = min(count, windows_at_once(length, batch, halved))
            if ranks.size() > 1 or now == 1:
                raise KernelError(
                    f"the memory of {skeleton.device} does not suffice: {str(error).strip().splitlines()[0][:200]}",
                    "Give --device cpu."
                    if tokens is None
                    else "Give shorter calibration windows (--length), or --device cpu.",
                ) from None
        while windows_at_once(length, batch, halved) >= now:
            halved += 1
        fewer = windows_at_once(length, batch, halved)
        warnings.warn(
            f"the memory of {skeleton.device} does not suffice for {now} calibration windows at once: "
            f"{fewer} from here on",
            stacklevel=2,
        )
        gc.collect()
        torch.cuda.empty_cache()


def _all_blocks(
    skeleton: Skeleton,
    resolved: Resolved,
    tokens: Tensor | None,
    run: Run,
    progress: Progress,
    importance: Importance | None,
    stages: Stages | None,
    batch: int,
    halved: int,
) -> list[TensorReport]:
    reports: list[TensorReport] = []
    need = calibration_need(resolved) if importance is None else Need.NOTHING
    rest = outside(skeleton, resolved)
    total = len(skeleton.blocks) + len(rest)
    hidden: list[Tensor] = []
    calls: dict[str, list[BlockCall]] = {block: [] for block in skeleton.blocks}
    if need > Need.NOTHING:
        assert tokens is not None
        hidden, calls = captured(skeleton, tokens, batch, halved)
    for index, block in enumerate(skeleton.blocks):
        found = run.load(index)
        if found is not None and need == Need.NOTHING:
            made = found[1]
        else:
            with skeleton.materialized(block) as module:
                if found is None:
                    made = _quantize_block(
                        skeleton, resolved, block, module, calls[block], hidden, run, index, importance, stages
                    )
                else:
                    made = found[1]
                    _restore_block(skeleton, resolved, block, found[0])
                if block != skeleton.blocks[-1]:
                    with torch.no_grad():
                        for i, call in enumerate(calls[block]):
                            hidden[i] = call.run(module, hidden[i])
        reports += made
        progress(Step(index + 1, total, _mean_error(made), found is not None))
    for index, assignment in enumerate(rest, len(skeleton.blocks)):
        found = run.load(index)
        made = found[1] if found is not None else _quantize_outside(skeleton, resolved, assignment, run, index)
        reports += made
        progress(Step(index + 1, total, _mean_error(made), found is not None))
    return reports


def _quantize_block(
    skeleton: Skeleton,
    resolved: Resolved,
    block: str,
    module: nn.Module,
    calls: list[BlockCall],
    hidden: list[Tensor],
    run: Run,
    index: int,
    importance: Importance | None,
    stages: Stages | None,
) -> list[TensorReport]:
    """Quantize the linears of a materialized block in place, and save them in `run`."""
    config = quantization_config(skeleton, resolved)
    wanted = {name: resolved.assignments[name] for name in skeleton.linears(block) if name in resolved.assignments}
    rewritten = rewrite(skeleton, block, wanted, calls, hidden)
    tensors, reports = rewritten.tensors | rewritten.scales, dict[str, TensorReport]()
    steps: Iterable[dict[str, Stats] | None] = (
        staged(skeleton, block, module, needs_of(wanted), calls, hidden, stages)
        if importance is None
        else [dict(importance)]
    )
    seen: set[str] = set()
    for stats in itertools.chain(steps, [None]):  # at last those that nothing is known of
        groups = [
            names
            for names in _alike(wanted, stats or {})
            if names[0] not in seen and (stats is None or names[0] in stats)
        ]
        done: dict[str, tuple[dict[str, Tensor], TensorReport]] = {}
        owners = ranks.owners([_cost([wanted[name] for name in names]) for names in groups])
        for names, owner in zip(groups, owners, strict=True):
            own = None if stats is None else [stats.pop(name) for name in names].pop()
            if owner != ranks.rank():
                continue
            weights = [skeleton.weight(name).float() for name in names]
            choices = _choose([wanted[name] for name in names], weights, own)
            for name in names:
                weight, choice = weights.pop(0), choices.pop(0)
                done[name] = _store(resolved.format, config, wanted[name], weight, choice, own)
                if calls:  # the block will be replayed
                    skeleton.replace_weight(name, choice.weight.dequantize())
        for each in ranks.to_first(done):
            for name, (laid_out, report) in each.items():
                tensors |= laid_out
                reports[name] = replace(report, notes=[*rewritten.notes.get(name, []), *report.notes])
        for names, owner in zip(groups, owners, strict=True):
            seen.update(names)
            for name in names if calls else ():
                ranks.hand_out(skeleton.weight(name), owner)
    run.save(index, tensors, made := [reports[name] for name in wanted if name in reports])
    return made


def _cost(assignments: Sequence[Assignment]) -> float:
    """How long some linears that are quantized together may take, beside others: a Hessian's are inverted first."""
    (_, columns), rows = assignments[0].shape, sum(a.shape[0] for a in assignments)
    whole = assignments[0].method.needs >= Need.HESSIAN
    return float(rows * columns * columns + columns**3 if whole else rows * columns)


def _alike(wanted: Mapping[str, Assignment], stats: Mapping[str, Stats]) -> list[list[str]]:
    """The linears, those together that read the same tensor and get their codes by the same method."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, assignment in wanted.items():
        key = (id(stats[name]), assignment.method) if name in stats else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _store(
    format: Format,
    config: Mapping[str, Any],
    assignment: Assignment,
    weight: Tensor,
    choice: Choice,
    stats: Stats | None,
) -> tuple[dict[str, Tensor], TensorReport]:
    """A linear's tensors by their full names, on the CPU, and what happened."""
    laid_out = format.lay_out(choice.weight, config)
    lost = _lost(assignment.scheme, weight, choice.weight, stats)
    report = _report(assignment, choice.weight, lost, stats, choice.notes)
    return {f"{assignment.module}.{suffix}": tensor.cpu() for suffix, tensor in laid_out.items()}, report


def _quantize_outside(
    skeleton: Skeleton, resolved: Resolved, assignment: Assignment, run: Run, index: int
) -> list[TensorReport]:
    """Quantize embeddings or head, whose input is not measured, some rows at a time in turn of ranks, and save them."""
    stored = skeleton.checkpoint.get(skeleton.key_of(f"{assignment.module}.weight"))
    alike = Stats.known(torch.ones(assignment.shape[1], device=skeleton.device, dtype=torch.float32), 1)
    made: dict[int, tuple[QTensor, Lost, list[str]]] = {}
    for number, rows in enumerate(chunk_rows(*assignment.shape, _ROWS_OUTSIDE.get(skeleton.device.type, 1 << 24))):
        if number % ranks.size() != ranks.rank():
            continue
        weight = stored[rows].to(skeleton.device).float()
        (choice,) = _choose([assignment], [weight], alike)
        lost = _lost(assignment.scheme, weight, choice.weight, None)
        made[number] = choice.weight.map(lambda t: t.cpu()), lost, choice.notes
    together = {number: piece for each in ranks.to_first(made) for number, piece in each.items()}
    if not ranks.first():
        return []
    pieces = [together[number] for number in sorted(together)]
    parts = {name: torch.cat([piece.parts[name] for piece, _, _ in pieces]) for name in pieces[0][0].parts}
    total = sum((own for _, own, _ in pieces), Lost())
    notes = list(dict.fromkeys(note for _, _, own in pieces for note in own))
    quantized = QTensor(assignment.scheme, assignment.shape, parts)
    config = quantization_config(skeleton, resolved)
    report = _report(assignment, quantized, total, None, notes)
    laid_out = resolved.format.lay_out(quantized, config)
    run.save(index, {f"{assignment.module}.{suffix}": tensor for suffix, tensor in laid_out.items()}, [report])
    return [report]


def _report(assignment: Assignment, weight: QTensor, lost: Lost, stats: Stats | None, notes: list[str]) -> TensorReport:
    return TensorReport(
        module=assignment.module,
        shape=assignment.shape,
        scheme=str(assignment.scheme),
        method=name_of(assignment.method),
        nbytes=weight.nbytes,
        error=lost.share,
        dropped=stats.dropped if stats else 0,
        notes=notes,
        vanished=lost.vanished,
    )


def _restore_block(skeleton: Skeleton, resolved: Resolved, block: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a materialized block the values of a result that was found."""
    config = quantization_config(skeleton, resolved)
    for name in skeleton.linears(block):
        if name in resolved.assignments:
            own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
            skeleton.replace_weight(name, resolved.format.read(own, config, name).dequantize())
    for name, parameter in skeleton.model.get_submodule(block).named_parameters(prefix=block):
        if name in tensors and name.removesuffix(".weight") not in resolved.assignments:  # a norm or bias, rewritten
            parameter.data.copy_(tensors[name])


def _choose(assignments: Sequence[Assignment], weights: Sequence[Tensor], stats: Stats | None) -> list[Choice]:
    """Codes for weights that read the same input and have one method; NumericsError naming the one that has none."""
    method, schemes = assignments[0].method, [assignment.scheme for assignment in assignments]
    if method.needs > Need.NOTHING and (stats is None or not stats.rows):
        nearest = [Method.quantize(method, w, scheme, None).weight for w, scheme in zip(weights, schemes, strict=True)]
        return [Choice(weight, ["no calibration input reached it: rounded to nearest"]) for weight in nearest]
    try:
        return method.quantize_alike(weights, schemes, stats)
    except NumericsError as error:
        if len(weights) > 1:  # which of them?
            return [_choose([a], [w], stats)[0] for a, w in zip(assignments, weights, strict=True)]
        raise NumericsError(f"{assignments[0].module}: {error.message}", error.hint) from None


@dataclass(frozen=True)
class Lost:
    """Squared error, of a weight's outputs or of itself, the squares it is a share of, and groups that became 0."""

    error: float = 0.0
    whole: float = 0.0
    vanished: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.error + other.error, self.whole + other.whole, self.vanished + other.vanished)

    @property
    def share(self) -> float:
        return self.error / max(self.whole, 1e-30)


def _lost(scheme: Scheme, weight: Tensor, quantized: QTensor, stats: Stats | None) -> Lost:
    """What the outputs lost; the weights, where there are no statistics of inputs."""
    hessian = None if stats is None or stats.need < Need.HESSIAN or not stats.rows else stats.hessian
    lost = Lost()
    # A few rows at a time: what is decoded is still in a core's cache when it is compared, and steps this small are not
    # shared among threads, which costs more than it gains where the others are busy. A GPU wants few launches.
    entries = 7 << 12 if hessian is None and weight.device.type == "cpu" else 1 << 22
    for rows in chunk_rows(*quantized.shape, entries):
        part = weight[rows].float()
        values = quantized.codec.dequantize(quantized.parts, quantized.shape, torch.float32, rows)
        gone = vanished(scheme, part, values)
        error = values.sub_(part)
        lost += Lost(
            float((error.square_() if hessian is None else (error @ hessian).mul_(error)).sum()),
            float((part.square() if hessian is None else (part @ hessian).mul_(part)).sum()),
            gone,
        )
    return lost


def _mean_error(reports: Sequence[TensorReport]) -> float:
    return sum(report.error for report in reports) / max(len(reports), 1)
