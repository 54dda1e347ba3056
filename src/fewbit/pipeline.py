"""Block by block: capture what enters a block, quantize its weights, replay with the quantized ones, keep the result.

Memory holds one block in float, its statistics and the calibration activations, never the model. Each finished block
is a file in the run's cache folder, under a fingerprint of all that determines it, so a run that was killed goes on
where it stopped; the output is put together from those files at the end (folder_output.py, gguf_output.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.cache import cache_folder
from fewbit.errors import FormatError, NumericsError, PlanError
from fewbit.formats.base import Format
from fewbit.formats.safetensors import read_file, write_file
from fewbit.methods.base import Choice, Method, name_of
from fewbit.models.rewrite import rewrite
from fewbit.models.skeleton import BlockCall, Skeleton
from fewbit.plan import Assignment, Resolved
from fewbit.schemes.base import QTensor, chunk_rows
from fewbit.stats import Need, Stats

_LOWEST_SHARE = 0.5


@dataclass(frozen=True)
class TensorReport:
    """What happened to one weight.

    `error`: relative squared error of its outputs on the calibration inputs, tokens weighted as in `gather` (of the
    weight itself where no Hessian was gathered). `dropped`: input rows left out because they were not finite.
    """

    module: str
    shape: tuple[int, int]
    scheme: str
    method: str
    nbytes: int
    error: float
    dropped: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` blocks, the last with this mean error; `resumed` if its result was found."""

    done: int
    total: int
    error: float
    resumed: bool


Progress = Callable[[Step], None]


def share_quantized(skeleton: Skeleton, resolved: Resolved) -> float:
    """Share of the blocks' parameters that the plan quantizes."""
    besides = {a.module for a in outside(skeleton, resolved)}
    quantized = sum(a.shape[0] * a.shape[1] for a in resolved.assignments.values() if a.module not in besides)
    return quantized / skeleton.parameters_in_blocks()


def outside(skeleton: Skeleton, resolved: Resolved) -> list[Assignment]:
    """What is quantized outside the blocks: embeddings and head, in formats that hold a whole model."""
    return [a for a in resolved.assignments.values() if not any(a.module.startswith(f"{b}.") for b in skeleton.blocks)]


def check(skeleton: Skeleton, resolved: Resolved) -> None:
    """Everything that can be known before any work: PlanError or NumericsError, naming the tensor."""
    if reason := skeleton.why_not():
        raise PlanError(reason)
    if (share := share_quantized(skeleton, resolved)) < _LOWEST_SHARE:
        why = [*resolved.notes, f"left as they are: {', '.join(resolved.kept) or 'no linears'}"]
        raise PlanError(
            f"only {share:.0%} of the parameters in the model's blocks would be quantized:\n  " + "\n  ".join(why),
            f"At least {_LOWEST_SHARE:.0%} must be; another --scheme or --format may fit more of them.",
        )
    for key, _, _ in skeleton.passed_through():
        tensor = skeleton.checkpoint.get(key)
        rows = tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)
        if not all(torch.isfinite(rows[part]).all() for part in chunk_rows(*rows.shape)):
            raise NumericsError(f"{key} has NaN or Inf", f"The checkpoint {skeleton.source.folder} is damaged.")


class Run:
    """The durable results of one quantization: a folder in the cache with a file for each finished block."""

    def __init__(self, fingerprint: str) -> None:
        self.folder = cache_folder() / "runs" / fingerprint

    def save(self, index: int, tensors: Mapping[str, Tensor], reports: Sequence[TensorReport]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        made = self.folder / f".block-{index:05d}"
        write_file(made, tensors, {"reports": json.dumps([asdict(report) for report in reports])})
        made.rename(self.file(index))

    def load(self, index: int) -> tuple[dict[str, Tensor], list[TensorReport]] | None:
        if not self.file(index).exists():
            return None
        try:
            tensors, metadata = read_file(self.file(index))
            reports = [TensorReport(**{**r, "shape": tuple(r["shape"])}) for r in json.loads(metadata["reports"])]
        except (FormatError, ValueError, KeyError, TypeError):  # damaged: it is made again
            self.file(index).unlink()
            return None
        return tensors, reports

    def file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def files(self) -> list[Path]:
        """All that were saved."""
        return sorted(self.folder.glob("block-*.safetensors"))

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


Importance = Mapping[str, Stats]
Stages = Sequence[Sequence[str]]


def fingerprint(
    skeleton: Skeleton,
    resolved: Resolved,
    tokens: Tensor | None,
    versions: Mapping[str, str],
    importance: Importance | None = None,
) -> str:
    """A digest of all that determines the result: weights, plan, calibration tokens, versions, arithmetic."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in skeleton.source.files]
    plan = [(a.module, str(a.scheme), repr(a.method)) for a in resolved.assignments.values()]
    digest = hashlib.sha256()
    config = skeleton.source.config
    digest.update(json.dumps([files, config, plan, resolved.format.name, dict(versions)], sort_keys=True).encode())
    digest.update(f"{skeleton.dtype} {skeleton.device.type}".encode())
    if tokens is not None:
        digest.update(str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes())
    for module, stats in sorted((importance or {}).items()):
        digest.update(module.encode() + stats.mean_square.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def quantization_config(skeleton: Skeleton, resolved: Resolved) -> dict[str, Any]:
    """What config.json will say; every linear that is not quantized, outside the blocks too, is named there."""
    skipped = [name for name in skeleton.all_linears() if name not in resolved.assignments]
    return resolved.format.config(list(resolved.assignments.values()), skipped, skeleton.source.dtype)


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
    many windows at least are computed at once.
    """
    reports: list[TensorReport] = []
    need = calibration_need(resolved) if importance is None else Need.NOTHING
    rest = outside(skeleton, resolved)
    total = len(skeleton.blocks) + len(rest)
    hidden: list[Tensor] = []
    calls: dict[str, list[BlockCall]] = {block: [] for block in skeleton.blocks}
    if need > Need.NOTHING:
        assert tokens is not None
        hidden, calls = skeleton.capture(_batches(tokens, batch))
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


def calibration_need(resolved: Resolved) -> Need:
    """The most that a method of the plan needs to know of inputs."""
    return max((a.method.needs for a in resolved.assignments.values()), default=Need.NOTHING)


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
    tensors = dict(rewritten.tensors)
    reports: dict[str, TensorReport] = {}
    steps: Iterable[dict[str, Stats] | None] = (
        _staged(skeleton, block, module, _needs(wanted), calls, hidden, stages)
        if importance is None
        else [dict(importance)]
    )
    for stats in itertools.chain(steps, [None]):  # at last those that nothing is known of
        for name, assignment in wanted.items():
            if name in reports or (stats is not None and name not in stats):
                continue
            own = None if stats is None else stats.pop(name)
            laid_out, report = _quantize_linear(
                skeleton, resolved.format, config, assignment, own, replayed=bool(calls)
            )
            tensors |= laid_out
            reports[name] = replace(report, notes=[*rewritten.notes.get(name, []), *report.notes])
    made = [reports[name] for name in wanted]
    run.save(index, tensors, made)
    return made


def _staged(
    skeleton: Skeleton,
    block: str,
    module: nn.Module,
    needs: Mapping[str, Need],
    calls: list[BlockCall],
    hidden: list[Tensor],
    stages: Stages | None,
) -> Iterator[dict[str, Stats]]:
    """Statistics of the linears of a block, those of each stage gathered when it comes to them."""
    first = gather(skeleton, block, module, needs, calls, hidden)
    if stages is None:
        yield first
        return
    groups = [[name for name in needs if name.removeprefix(f"{block}.") in stage] for stage in stages]
    if not stages:
        leaders: dict[int, list[str]] = {}
        for name, stats in first.items():
            leaders.setdefault(id(stats), []).append(name)
        groups = list(leaders.values())
    start = {name: first[name] for name in groups[0] if name in first}
    first.clear()
    yield start
    for group in groups[1:]:
        yield gather(skeleton, block, module, {name: needs[name] for name in group}, calls, hidden)


def _quantize_linear(
    skeleton: Skeleton,
    format: Format,
    config: Mapping[str, Any],
    assignment: Assignment,
    stats: Stats | None,
    replayed: bool,
) -> tuple[dict[str, Tensor], TensorReport]:
    """Quantize one linear of a materialized block, in place if that is to be `replayed`; its tensors by their full
    names, and what happened."""
    weight = skeleton.weight(assignment.module).float()
    choice = _choose(assignment, weight, stats)
    stored = choice.weight.map(lambda t: t.cpu())
    laid_out = {f"{assignment.module}.{suffix}": tensor for suffix, tensor in format.lay_out(stored, config).items()}
    report = _report(assignment, stored, _relative_error(weight, choice.weight, stats), stats, choice.notes)
    if replayed:
        skeleton.replace_weight(assignment.module, choice.weight.dequantize())
    return laid_out, report


def _quantize_outside(
    skeleton: Skeleton, resolved: Resolved, assignment: Assignment, run: Run, index: int
) -> list[TensorReport]:
    """Quantize embeddings or head, whose input is not measured, some rows at a time, and save them in `run`."""
    stored = skeleton.checkpoint.get(skeleton.key_of(f"{assignment.module}.weight"))
    alike = Stats.known(torch.ones(assignment.shape[1], device=skeleton.device), 1)
    pieces: list[QTensor] = []
    notes: list[str] = []
    for rows in chunk_rows(*assignment.shape):
        choice = _choose(assignment, stored[rows].to(skeleton.device).float(), alike)
        pieces.append(choice.weight.map(lambda t: t.cpu()))
        notes += [note for note in choice.notes if note not in notes]
    parts = {name: torch.cat([piece.parts[name] for piece in pieces]) for name in pieces[0].parts}
    weight = QTensor(assignment.scheme, assignment.shape, parts)
    config = quantization_config(skeleton, resolved)
    report = _report(assignment, weight, _relative_error(stored, weight, None), None, notes)
    laid_out = resolved.format.lay_out(weight, config)
    run.save(index, {f"{assignment.module}.{suffix}": tensor for suffix, tensor in laid_out.items()}, [report])
    return [report]


def _report(
    assignment: Assignment, weight: QTensor, error: float, stats: Stats | None, notes: list[str]
) -> TensorReport:
    return TensorReport(
        module=assignment.module,
        shape=assignment.shape,
        scheme=str(assignment.scheme),
        method=name_of(assignment.method),
        nbytes=weight.nbytes,
        error=error,
        dropped=stats.dropped if stats else 0,
        notes=notes,
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


class _AllFed(Exception):
    """The last linear of a block has its input: what the block would make of it is not needed (a tenth of the time)."""


def _needs(wanted: Mapping[str, Assignment]) -> dict[str, Need]:
    """What the methods of these linears need to know of their inputs."""
    return {name: a.method.needs for name, a in wanted.items() if a.method.needs > Need.NOTHING}


def gather(
    skeleton: Skeleton,
    block: str,
    module: nn.Module,
    needs: Mapping[str, Need],
    calls: list[BlockCall],
    hidden: list[Tensor],
    *,
    alike: bool = False,
) -> dict[str, Stats]:
    """Statistics of each linear's input over all batches, one object for all linears that read the same tensor.

    Unless all tokens are to count `alike`, a token counts in proportion to the norm of the hidden state that enters the
    block. The few tokens of giant norm that models use as attention sinks are attended to by all others, so an error in
    them spreads: on the demo model at 4 bits this takes 13 % off the KL divergence (0.184 to 0.160; by the square of
    the norm it is 0.181).
    """
    stats: dict[str, Stats] = {}
    seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    reads: dict[str, str] = {}  # linear -> the first linear that reads the same tensor
    fed: list[str] = []  # linears, in the order in which the first batch reached them
    last: str | None = None
    weight: Tensor | None = None
    shapes = skeleton.linears(block)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if name not in reads:
                before = seen.get(id(x))
                reads[name] = before[1] if before and before[0]() is x else name
                seen.setdefault(id(x), (weakref.ref(x), name))
                if before and before[0]() is not x:
                    seen[id(x)] = (weakref.ref(x), name)
                if reads[name] == name:
                    readers = max(needs.values())
                    stats[name] = Stats(shapes[name][1], readers, skeleton.device)
            if reads[name] == name:
                # Some models flatten [batch, tokens]; where rows are not tokens (routed experts), all count alike.
                tokens = weight is not None and weight.numel() == x.numel() // x.shape[-1]
                stats[name].add(x, weight if tokens else None)
            fed.append(name)
            if name == last:
                raise _AllFed

        return record

    handles = [skeleton.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in needs]
    try:
        with torch.no_grad():
            for call, states in zip(calls, hidden, strict=True):
                weight = None if alike else states.float().norm(dim=-1).clamp(min=1e-6)
                with suppress(_AllFed):
                    call.run(module, states)
                if last is None and sorted(fed) == sorted(needs):  # each once: after this one nothing is left to see
                    last = fed[-1]
                fed.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: stats[leader] for name, leader in reads.items()}


def _choose(assignment: Assignment, weight: Tensor, stats: Stats | None) -> Choice:
    method = assignment.method
    if method.needs > Need.NOTHING and (stats is None or not stats.rows):
        choice = Method.quantize(method, weight, assignment.scheme, None)
        return Choice(choice.weight, ["no calibration input reached it: rounded to nearest"])
    try:
        return method.quantize(weight, assignment.scheme, stats)
    except NumericsError as error:
        raise NumericsError(f"{assignment.module}: {error.message}", error.hint) from None


def _relative_error(weight: Tensor, quantized: QTensor, stats: Stats | None) -> float:
    """Squared error of the outputs over the squared outputs; of the weights where there are no statistics of inputs."""
    hessian = None if stats is None or stats.need < Need.HESSIAN or not stats.rows else stats.hessian
    n, k = quantized.shape
    lost = whole = 0.0
    # A few rows at a time: what is decoded is still in a core's cache when it is compared, and steps this small are not
    # shared among threads, which costs more than it gains where the others are busy.
    for rows in chunk_rows(n, k, 7 << 12 if hessian is None else 1 << 22):
        part = weight[rows].float()
        error = quantized.codec.dequantize(quantized.parts, quantized.shape, torch.float32, rows).sub_(part)
        lost += float((error.square_() if hessian is None else (error @ hessian).mul_(error)).sum())
        whole += float((part.square() if hessian is None else (part @ hessian).mul_(part)).sum())
    return lost / max(whole, 1e-30)


def _mean_error(reports: Sequence[TensorReport]) -> float:
    return sum(report.error for report in reports) / max(len(reports), 1)


def measure(skeleton: Skeleton, tokens: Tensor, progress: Progress) -> dict[str, Stats]:
    """Mean squares of the inputs of all linears in blocks, all tokens counting alike, nothing being quantized."""
    found: dict[str, Stats] = {}
    hidden, calls = skeleton.capture(_batches(tokens))
    for index, block in enumerate(skeleton.blocks):
        with skeleton.materialized(block) as module:
            wanted = dict.fromkeys(skeleton.linears(block), Need.MEAN_SQUARE)
            found |= gather(skeleton, block, module, wanted, calls[block], hidden, alike=True)
            if block != skeleton.blocks[-1]:
                with torch.no_grad():
                    for i, call in enumerate(calls[block]):
                        hidden[i] = call.run(module, hidden[i])
        progress(Step(index + 1, len(skeleton.blocks), 0.0, False))
    return found


def _batches(tokens: Tensor, least: int = 1) -> list[Tensor]:
    """About 2048 tokens at a time: enough to keep two cores or a GPU busy, small beside the statistics."""
    return list(tokens.split(max(least, 2048 // tokens.shape[1])))


def timed() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
