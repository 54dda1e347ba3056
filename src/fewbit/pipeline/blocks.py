"""Quantizes a model block by block: captures a block's inputs, quantizes its weights, and replays it with them.

Memory holds one block in float, its statistics and the calibration activations, but never the whole model. Each
finished block is a file in the run's cache folder, under a fingerprint of everything that determines it. So a killed
run resumes where it stopped. At the end write_folder.py or write_gguf.py writes the output from these files.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fewbit.errors import KernelError, NumericsError
from fewbit.methods.base import Choice, Method, name_of
from fewbit.models.experts import is_of_expert
from fewbit.models.skeleton import BlockCall
from fewbit.pipeline.agreed import agreed
from fewbit.pipeline.block_tuning import BlockTuning, Problem, tune
from fewbit.pipeline.capture import Block, Inputs, captured, needs_of, original_of
from fewbit.pipeline.original import Original
from fewbit.pipeline.progress import Progress, Step
from fewbit.pipeline.rewrite import rewrite
from fewbit.pipeline.run import Run, TensorReport
from fewbit.pipeline.settled import Settled
from fewbit.pipeline.staged import staged
from fewbit.plans.plan import Assignment
from fewbit.products import in_tf32
from fewbit.schemes.base import QTensor, Scheme, chunk_rows, vanished
from fewbit.stats import Need, Stats
from fewbit.system import ranks, threads

_ENTRIES = {"cpu": 1 << 22}  # of a weight that are measured, or of embeddings or head that are quantized, at a time


def quantize_blocks(
    settled: Settled, inputs: Inputs, run: Run, progress: Progress, tuning: BlockTuning | None = None
) -> list[TensorReport]:
    """Quantize all blocks, and the weights outside the blocks, and save them in `run`. tuning: how blocks are tuned.

    If a GPU runs out of memory, start again with half as many windows in a batch, after a warning. KernelError if one
    window does not fit.
    """
    device = settled.skeleton.device
    while True:
        try:
            return _all_blocks(settled, inputs, run, progress, tuning)
        except torch.OutOfMemoryError as error:
            if ranks.size() > 1 or inputs.at_once == 1:
                raise KernelError(
                    f"{device} is out of memory: {str(error).strip().splitlines()[0][:200]}",
                    "Give `device=cpu`."
                    if inputs.tokens is None
                    else "Give shorter calibration windows (`length`), or `device=cpu`.",
                ) from None
        fewer = inputs.halved()
        warnings.warn(
            f"{device} is out of memory with {inputs.at_once} calibration windows in a batch: "
            f"continuing with {fewer.at_once}",
            stacklevel=2,
        )
        inputs = fewer
        gc.collect()
        torch.cuda.empty_cache()


def _all_blocks(
    settled: Settled, inputs: Inputs, run: Run, progress: Progress, tuning: BlockTuning | None
) -> list[TensorReport]:
    skeleton, reports = settled.skeleton, list[TensorReport]()
    replayed = tuning is not None or (inputs.importance is None and settled.need > Need.NOTHING)
    rounded_only = tuning is None and settled.need == Need.NOTHING
    hidden: list[Tensor] = []
    original: Original | None = None
    calls: dict[str, list[BlockCall]] = {block: [] for block in skeleton.blocks}
    if replayed:
        compares = tuning is not None or settled.need >= Need.SHIFT
        hidden, calls = captured(skeleton, inputs, compares=compares)
        original = original_of(inputs, hidden) if compares else None

    def add(new: list[TensorReport], saved: object, done: int, total: int, what: str = "block") -> None:
        reports.extend(new)
        progress(Step(done, total, _mean_error(new), saved is not None, new[0].gain if new else None, what))

    count = len(skeleton.blocks)
    for index, name in enumerate(skeleton.blocks):
        saved = run.load(index)
        if saved is not None and not replayed:
            add(saved[1], saved, index + 1, count)
            continue
        with skeleton.materialized(name, as_stored=rounded_only) as module:
            block = Block(skeleton, name, module, calls[name], hidden, original)
            known = inputs.importance is not None  # then nothing runs the block before its weights change
            if original is not None and (saved is not None or known or _rewrites(settled, block)):
                # Before the weights change, so that a resumed run computes the same.
                original.advance(skeleton, block.run)
            if saved is None:
                new = _save(run, index, _quantize_block(settled, block, inputs, tuning))
            else:
                new = saved[1]
                restore(settled, block, saved[0])
            if name != skeleton.blocks[-1]:
                block.replay()
        add(new, saved, index + 1, count)
    for done, assignment in enumerate(settled.outside, 1):
        index = count + done - 1
        saved = run.load(index)
        new = saved[1] if saved is not None else _save(run, index, _quantize_outside(settled, assignment))
        add(new, saved, done, len(settled.outside), "embeddings and head")
    return reports


Tensors = dict[str, Tensor]  # by their names in the output


def _save(run: Run, index: int, done: tuple[Tensors, list[TensorReport]]) -> list[TensorReport]:
    """Save the result of a block and return its reports. No variable keeps its tensors while the next is quantized."""
    run.save(index, *done)
    return done[1]


def _quantize_block(
    settled: Settled, block: Block, inputs: Inputs, tuning: BlockTuning | None = None
) -> tuple[Tensors, list[TensorReport]]:
    """Quantize the linears of a materialized block in place. Returns their tensors in the output, and their reports."""
    own = block.skeleton.linears(block.name)
    assignments = {name: settled.resolved.assignments[name] for name in own if name in settled.resolved.assignments}
    rewritten = rewrite(block, assignments)
    assignments = agreed(assignments, block.skeleton.weight)
    tensors, reports = rewritten.tensors | rewritten.scales, dict[str, TensorReport]()
    originals = {} if tuning is None else {name: block.skeleton.weight(name).clone() for name in assignments}
    stages: Iterable[Iterable[dict[str, Stats] | None]] = (
        staged(block, needs_of(assignments), inputs.stages)
        if inputs.importance is None
        else [[dict(inputs.importance)]]
    )
    left = dict(assignments)
    for stage in itertools.chain(stages, [[None]]):  # finally, linears without statistics
        done, owners = dict[str, tuple[Tensors, TensorReport]](), dict[str, int]()
        for stats in stage:
            now = {name: left.pop(name) for name in list(left) if stats is None or name in stats}
            ranks_of, on_this_rank = _quantize_together(settled, block, now, stats)
            owners |= ranks_of
            done |= on_this_rank
        if block.calls:  # the block will be replayed
            if block.original is not None and left:  # later stages compare with the original weights
                block.original.keep_weights(block.skeleton, owners)
            _replace_weights(settled, block, done, owners)
        for results in ranks.gather_to_first(done):
            for name, (stored, report) in results.items():
                tensors |= stored
                reports[name] = replace(report, notes=[*rewritten.notes.get(name, []), *report.notes])
    if tuning is not None and reports:
        _tune(settled, block, originals, (tensors, reports), tuning)
    return tensors, [reports[name] for name in assignments if name in reports]


def _tune(
    settled: Settled,
    block: Block,
    originals: Mapping[str, Tensor],
    done: tuple[Tensors, dict[str, TensorReport]],
    how: BlockTuning,
) -> None:
    """Tune a block that has its quantized weights, and change what is `done`, if that lowers its held-out error."""
    tensors, reports = done
    assert block.original is not None
    problem = Problem(block, block.original.outputs)
    tuned = tune(problem, {name: read(settled, name, tensors) for name in reports}, originals, how)
    gain, notes = 0.0, tuned.notes
    if tuned.weights is not None:
        before, new = problem.measured(), dict[str, Tensor]()
        for name, weight in tuned.weights.items():
            new |= _laid_out(settled, settled.resolved.assignments[name], weight)
            _dequantize_into(settled, block, name, tensors | new)
        if (after := problem.measured()) < before:
            gain = 1 - after / before
            tensors.update(new)
        else:
            notes = ["tuning did not lower the block's error on the held-out windows: its codes and scales stay"]
            for name in reports:
                _dequantize_into(settled, block, name, tensors)
    for name, report in reports.items():
        moved = tuned.moved.get(name) if gain else None
        reports[name] = replace(report, gain=gain, moved=moved, notes=[*report.notes, *notes])


def _rewrites(settled: Settled, block: Block) -> bool:
    assignments = settled.resolved.assignments
    return any(name in assignments and assignments[name].method.rewrites for name in block.skeleton.linears(block.name))


def _quantize_together(
    settled: Settled, block: Block, assignments: Mapping[str, Assignment], stats: dict[str, Stats] | None
) -> tuple[dict[str, int], dict[str, tuple[Tensors, TensorReport]]]:
    """Quantize linears of a block, each on one rank. The block keeps its weights.

    Returns linear -> its rank, and for the linears of this rank: linear -> its tensors in the output, and its report.
    """
    groups = alike(assignments, stats or {})
    owners = ranks.owners([_cost([assignments[name] for name in names]) for names in groups])
    here = [names for names, owner in zip(groups, owners, strict=True) if owner == ranks.rank()]

    def quantized(names: list[str], own: Stats | None) -> dict[str, tuple[Tensors, TensorReport]]:
        weights = [_weight(block, assignments[name]) for name in names]
        choices = choose([assignments[name] for name in names], weights, own)
        return {name: _stored(settled, assignments[name], weights.pop(0), choices.pop(0), own) for name in names}

    done: dict[str, tuple[Tensors, TensorReport]] = {}
    if stats is None and block.skeleton.device.type == "cpu":
        for made in threads.each([partial(quantized, names, None) for names in here]):
            done |= made
    else:  # one after the other, so that the statistics of each are freed before the next
        for names in groups:
            own = None if stats is None else [stats.pop(name) for name in names].pop()
            if names in here:
                done |= quantized(names, own)
    return {name: owner for names, owner in zip(groups, owners, strict=True) for name in names}, done


def _weight(block: Block, assignment: Assignment) -> Tensor:
    """The weight of a linear, in float32 unless its scheme rounds it as it is stored."""
    weight = block.skeleton.weight(assignment.module)
    as_stored = assignment.scheme.rounds_stored and assignment.method.needs == Need.NOTHING
    return weight if as_stored else weight.float()


def _replace_weights(
    settled: Settled,
    block: Block,
    done: Mapping[str, tuple[Tensors, TensorReport]],
    owners: Mapping[str, int],
) -> None:
    """Give a materialized block, on all ranks, the quantized weights of the linears `owners`."""
    for name, owner in owners.items():
        if name in done:
            _dequantize_into(settled, block, name, done[name][0])
        ranks.broadcast(block.skeleton.weight(name), owner)


def _dequantize_into(settled: Settled, block: Block, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the weight of a linear of a materialized block with that of its `tensors` in the output."""
    block.skeleton.replace_weight(name, read(settled, name, tensors).dequantize())


def read(settled: Settled, name: str, tensors: Mapping[str, Tensor]) -> QTensor:
    """The weight of a linear from its `tensors` in the output, on the device of the model."""
    assignment, device = settled.resolved.assignments[name], settled.skeleton.device
    suffixes = settled.resolved.format.specs(assignment.shape, assignment.scheme)
    own = {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes}
    weight = settled.resolved.format.read(own, settled.config, settled.stored_as[name])
    if assignment.order is not None:
        weight = replace(weight, permutation=assignment.order)
    return weight.map(lambda part: part.to(device))


def _cost(assignments: Sequence[Assignment]) -> float:
    """The relative time to quantize linears that share an input. A method that needs the Hessian also inverts it."""
    (_, columns), rows = assignments[0].shape, sum(a.shape[0] for a in assignments)
    hessian = assignments[0].method.needs >= Need.HESSIAN
    return float(rows * columns * columns + columns**3 if hessian else rows * columns)


def alike(assignments: Mapping[str, Assignment], stats: Mapping[str, Stats]) -> list[list[str]]:
    """The linears in groups: those that read the same tensor and have the same method are quantized together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, assignment in assignments.items():
        key = (id(stats[name]), assignment.method, assignment.order is None) if name in stats else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _stored(
    settled: Settled, assignment: Assignment, weight: Tensor, choice: Choice, stats: Stats | None
) -> tuple[Tensors, TensorReport]:
    """A linear's tensors in the output, on the CPU, and its report."""
    lost = _lost(assignment.scheme, weight, choice.weight, stats)
    format, notes = settled.resolved.format, list(choice.notes)
    tensors = _laid_out(settled, assignment, choice.weight)
    if format.measures_inputs(assignment.scheme):
        unseen = stats is None or stats.is_empty
        if unseen:
            notes.append("no input reached it, so the scale of its inputs is 1")
        scales = format.scales_of_inputs(assignment.scheme, 0.0 if stats is None or unseen else stats.largest)
        tensors |= {f"{assignment.module}.{suffix}": tensor for suffix, tensor in scales.items()}
    report = _report(assignment, lost, stats, notes)
    return tensors, replace(report, target=choice.target)


def _laid_out(settled: Settled, assignment: Assignment, weight: QTensor) -> Tensors:
    module = settled.stored_as[assignment.module]
    if assignment.order is not None:  # its columns are in the file's order, and `read` knows that
        weight = replace(weight, permutation=None)
    laid_out = settled.resolved.format.lay_out(weight, settled.config, module)
    return {f"{assignment.module}.{suffix}": tensor.cpu() for suffix, tensor in laid_out.items()}


def _quantize_outside(settled: Settled, assignment: Assignment) -> tuple[Tensors, list[TensorReport]]:
    """Quantize embeddings or head, without input statistics. Ranks take turns at chunks of rows."""
    skeleton = settled.skeleton
    stored = skeleton.checkpoint.get(skeleton.key_of(f"{assignment.module}.weight"))
    alike = Stats.from_mean_square(torch.ones(assignment.shape[1], device=skeleton.device, dtype=torch.float32), 1)
    own: dict[int, tuple[QTensor, Lost, list[str]]] = {}
    entries = _ENTRIES.get(skeleton.device.type, 1 << 24)
    pieces = chunk_rows(*assignment.shape, entries, assignment.scheme.rows or 1)
    assignment = replace(assignment, scheme=assignment.scheme.for_all(stored[rows] for rows in pieces))
    for number, rows in enumerate(pieces):
        if number % ranks.size() != ranks.rank():
            continue
        weight = stored[rows].to(skeleton.device).float()
        (choice,) = choose([assignment], [weight], alike)
        lost = _lost(assignment.scheme, weight, choice.weight, None)
        own[number] = choice.weight.map(lambda t: t.cpu()), lost, choice.notes
    together = {number: piece for each in ranks.gather_to_first(own) for number, piece in each.items()}
    if not ranks.first():
        return {}, []
    found = [together[number] for number in sorted(together)]
    parts = {name: torch.cat([piece.parts[name] for piece, _, _ in found]) for name in found[0][0].parts}
    total = sum((lost for _, lost, _ in found), Lost())
    notes = list(dict.fromkeys(note for _, _, notes in found for note in notes))
    quantized = QTensor(assignment.scheme, assignment.shape, parts)
    return _laid_out(settled, assignment, quantized), [_report(assignment, total, None, notes)]


def _report(assignment: Assignment, lost: Lost, stats: Stats | None, notes: list[str]) -> TensorReport:
    return TensorReport(
        module=assignment.module,
        shape=assignment.shape,
        scheme=str(assignment.scheme),
        method=name_of(assignment.method),
        nbytes=assignment.scheme.nbytes(assignment.shape),
        error=lost.share,
        dropped=stats.dropped if stats else 0,
        notes=notes,
        vanished=lost.vanished,
        rows=stats.rows if stats and is_of_expert(assignment.module) else None,
    )


def restore(settled: Settled, block: Block, tensors: Tensors) -> None:
    """Give a materialized block the weights of a result that was saved earlier."""
    assignments = settled.resolved.assignments
    for name in block.skeleton.linears(block.name):
        if name in assignments:
            _dequantize_into(settled, block, name, tensors)
    for name, parameter in block.module.named_parameters(prefix=block.name):
        if name in tensors and name.removesuffix(".weight") not in assignments:  # a norm or bias that was rewritten
            parameter.data.copy_(tensors[name])


def choose(assignments: Sequence[Assignment], weights: Sequence[Tensor], stats: Stats | None) -> list[Choice]:
    """Codes for weights with the same input and method. NumericsError names the weight that cannot be quantized.

    The columns of a weight are quantized in the order of the file, if that differs.
    """
    if (order := assignments[0].order) is not None:
        order = order.to(weights[0].device)
        alike = [replace(assignment, order=None) for assignment in assignments]
        found = choose(alike, [w[:, order] for w in weights], None if stats is None else stats.ordered(order))
        return [replace(each, weight=replace(each.weight, permutation=order)) for each in found]
    method, schemes = assignments[0].method, [assignment.scheme for assignment in assignments]
    if method.needs > Need.NOTHING and (stats is None or stats.is_empty):
        nearest = [Method.quantize(method, w, scheme, None).weight for w, scheme in zip(weights, schemes, strict=True)]
        return [Choice(weight, ["no calibration input reached this linear: rounded to nearest"]) for weight in nearest]
    try:
        return method.quantize_alike(weights, schemes, stats)
    except NumericsError as error:
        if len(weights) > 1:  # find the one that failed
            return [choose([a], [w], stats)[0] for a, w in zip(assignments, weights, strict=True)]
        raise NumericsError(f"{assignments[0].module}: {error.message}", error.hint) from None


@dataclass(frozen=True)
class Lost:
    """The loss of one weight. `error`: squared error, of its outputs or of itself. `whole`: the sum of squares that
    `error` is relative to. `vanished`: number of groups that became 0."""

    error: float = 0.0
    whole: float = 0.0
    vanished: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.error + other.error, self.whole + other.whole, self.vanished + other.vanished)

    @property
    def share(self) -> float:
        return self.error / max(self.whole, 1e-30)


def _lost(scheme: Scheme, weight: Tensor, quantized: QTensor, stats: Stats | None) -> Lost:
    """The error of the weight's outputs, or of the weight itself if there is no Hessian of its inputs."""
    if (order := quantized.permutation) is not None:
        weight, stats = weight[:, order], None if stats is None else stats.ordered(order)
    if stats is None or stats.need < Need.HESSIAN or stats.is_empty:
        return Lost(*scheme.lost(weight, quantized.parts))
    lost = Lost()
    for rows in chunk_rows(*quantized.shape, _ENTRIES.get(weight.device.type, 1 << 24)):
        part = weight[rows].float()
        values = quantized.codec.dequantize(quantized.parts, quantized.shape, torch.float32, rows)
        gone = vanished(scheme, part, values)
        error = values.sub_(part)
        with in_tf32(part.device):
            of_error, whole = ((each @ stats.hessian).mul_(each).sum() for each in (error, part))
        lost += Lost(float(of_error), float(whole), gone)
    return lost


def _mean_error(reports: Sequence[TensorReport]) -> float:
    return sum(report.error for report in reports) / max(len(reports), 1)
