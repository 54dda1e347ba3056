"""What each weight of a plan costs at each width that it may have: nats of KL divergence per token.

A weight is quantized at every width by the plan's own method, with the statistics of the original model's inputs. The
Fisher information of its linear (`fisher.py`) turns the error into nats. An output head is measured itself: the KL
divergence of the logits, on a quarter of the tokens. An embedding's error δ_t at the first block's input costs
½ sum_tn g_tn² δ_tn². A tensor that is both costs the sum. Costs take little space, so they are kept in the cache:
another size needs no second sweep.

Costs add up where they are small. At 2 bits, errors are large and disturb one another, and the sum is too low.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import FormatError, PlanError
from fewbit.formats.base import Shape, Stored
from fewbit.models import experts, on_text
from fewbit.pipeline import blocks, capture, fisher
from fewbit.pipeline.capture import Block, Importance
from fewbit.pipeline.divergence import nats_between
from fewbit.pipeline.fisher import Sweep
from fewbit.pipeline.settled import Settled
from fewbit.plans.plan import Assignment
from fewbit.schemes.base import QTensor, Scheme, chunk_rows
from fewbit.stats import Need, Stats
from fewbit.system.cache import cache_folder, writing
from fewbit.system.files import read_json, replace_text
from fewbit.system.kept import label

TOKENS = 16384  # of the calibration text
_TOKENS_OF_HEAD = 4096  # of these: logits of large vocabularies take longer than all blocks

Told = Callable[[int, int], None]  # steps done, of all steps


@dataclass(frozen=True)
class Costs:
    """of: module -> scheme -> nats per token. units: module -> the name of those that runtimes compute with it, and
    that get one scheme. tokens: how many were measured."""

    of: Mapping[str, Mapping[str, float]]
    units: Mapping[str, str]
    tokens: int


def samples(length: int) -> int:
    """The number of windows of `length` tokens that costs are measured on."""
    return max(1, TOKENS // length)


def widths(settled: Settled) -> dict[str, list[Scheme]]:
    """Module -> the schemes that its weight may have in the plan's format.

    PlanError if the format stores one width only.
    """
    format = settled.resolved.format

    def fits(shape: Shape, own: Scheme, scheme: Scheme) -> bool:
        """Whether one checkpoint stores a weight with the scheme, beside another that has its own."""
        pair = (Stored("one", shape, own), Stored("other", shape, scheme))
        return format.why_not(shape, scheme) is None and format.why_not_together(pair) is None

    found = {
        module: [scheme for scheme in a.scheme.widths(a.shape) if fits(a.shape, a.scheme, scheme)]
        for module, a in settled.resolved.assignments.items()
    }
    if all(len(schemes) < 2 for schemes in found.values()):
        kinds = ", ".join(sorted({str(a.scheme) for a in settled.resolved.assignments.values()}))
        raise PlanError(
            f"{format.name} files store {kinds} in one width only, so their size cannot be chosen",
            "Formats with several widths: gptq and compressed-tensors (integers), gguf (block types).",
        )
    if settled.resolved.plan.activations is not None:
        raise PlanError(
            f"plan {settled.resolved.plan.name} has servers round activations, which needs one width",
            "Use a plan without activations, such as w4a16.",
        )
    return found


def cached(options: Mapping[str, Sequence[Scheme]], key: str, model: str, measure: Callable[[], Costs]) -> Costs:
    """The costs in the cache, or else those that `measure` returns.

    key: a digest of everything that determines them, except the options. model: as the user named it.
    """
    spelled = json.dumps({module: [str(s) for s in schemes] for module, schemes in options.items()})
    place = _place(f"{key} {spelled} {TOKENS} {_TOKENS_OF_HEAD}")
    try:
        found = read_json(place)
        return Costs(found["of"], found["units"], found["tokens"])
    except (OSError, FormatError, KeyError, TypeError):
        costs = measure()
    _keep(place, asdict(costs))
    label(place, model, "loss of each weight at each width")
    return costs


def kept(key: str, model: str, measure: Callable[[], float]) -> float:
    """A KL divergence in the cache, or else the one that `measure` returns.

    key: everything that determines it. model: as the user named it.
    """
    place = _place(key)
    try:
        return float(read_json(place)["kl"])
    except (OSError, FormatError, KeyError, TypeError, ValueError):
        kl = measure()
    _keep(place, {"kl": kl})
    label(place, model, "loss of one choice of widths")
    return kl


def _place(key: str) -> Path:
    return cache_folder() / "costs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _keep(place: Path, found: Mapping[str, Any]) -> None:
    with writing(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_text(place, json.dumps(dict(found)))  # another process may measure the same


def measured(
    settled: Settled,
    options: Mapping[str, Sequence[Scheme]],
    tokens: Tensor,
    importance: Importance | None,
    tell: Told,
) -> Costs:
    """Measure the costs on the first of the windows `tokens`, about `TOKENS` tokens.

    importance: linear -> statistics that replace those of the windows.
    """
    tokens = tokens[: samples(tokens.shape[1])]
    steps = 2 * len(settled.skeleton.blocks) + 1
    done = iter(range(1, steps + 1))
    sweep = Sweep(settled.skeleton, tokens, lambda: tell(next(done), steps))
    nats, units = dict[str, dict[str, float]](), dict[str, str]()
    with on_text.ending(settled.skeleton) as end:
        sweep.start(end)
        nats |= _of_head(settled, options, sweep, end)
    tell(next(done), steps)
    for name in reversed(settled.skeleton.blocks):
        with sweep.block(name) as block:
            own, together = _of_block(settled, options, sweep, block, importance)
        nats |= own
        units |= together
        tell(next(done), steps)
    for module, each in _of_embedding(settled, options, sweep).items():
        nats[module] = {scheme: cost + nats.get(module, {}).get(scheme, 0.0) for scheme, cost in each.items()}
    every = {module: units.get(module, module) for module in nats}
    per_token = {module: {s: cost / tokens.numel() for s, cost in each.items()} for module, each in nats.items()}
    return Costs(per_token, every if not settled.resolved.format.suffix else {m: m for m in nats}, tokens.numel())


def _of_block(
    settled: Settled,
    options: Mapping[str, Sequence[Scheme]],
    sweep: Sweep,
    block: Block,
    importance: Importance | None,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The costs of a block's linears, in nats over all tokens, and their units."""
    own = {name: settled.resolved.assignments[name] for name in block.skeleton.linears(block.name) if name in options}
    with _same_inputs(block, list(own)) as units:
        scores = sweep.backward(block, list(own))
    # A target needs the quantized model, which does not exist yet.
    needs = {name: min(a.need, Need.HESSIAN) for name, a in own.items()}
    nats: dict[str, dict[str, float]] = {}
    need = max(needs.values(), default=Need.NOTHING)
    groups = capture.grouped(block, list(own), Need.HESSIAN)
    pools = None
    if len(groups) > 1 and importance is None and need > Need.NOTHING:
        pools = capture.gather_pools(block, list(own), need)
    for group in groups:
        asking = {name: need for name in group if needs[name] > Need.NOTHING}
        stats: Mapping[str, Stats] = {}
        if importance is not None:
            stats = {name: importance[name] for name in asking if name in importance}
        elif asking:
            stats = capture.gather(block, asking, pools=pools)
        found = fisher.fishers(block, {name: scores[name] for name in group if scores[name].of_rows})
        for names in blocks.alike({name: own[name] for name in group}, stats):
            for name, scheme, values in _values(block, [own[name] for name in names], options, stats.get(names[0])):
                cost = found[name].cost(block.skeleton.weight(name), values) if name in found else 0.0
                nats.setdefault(name, {})[str(scheme)] = cost
    return nats, units


def _values(
    block: Block, assignments: Sequence[Assignment], options: Mapping[str, Sequence[Scheme]], stats: Stats | None
) -> Iterator[tuple[str, Scheme, Tensor]]:
    """(name, scheme, values) of linears that read one tensor and are quantized together, at each of their options.

    Those with the same options are quantized as one weight, one above the other: a sweep over columns takes about as
    long for more rows.
    """
    stacks: dict[tuple[Scheme, ...], list[Assignment]] = {}
    for assignment in assignments:
        schemes = tuple(options[assignment.module])
        alone = not all(scheme.by_rows(assignment.shape) for scheme in schemes)
        stacks.setdefault(schemes, []).append(assignment)
        if alone:
            yield from _stacked_values(block, stacks.pop(schemes), schemes, stats)
    for schemes, members in stacks.items():
        yield from _stacked_values(block, members, schemes, stats)


def _stacked_values(
    block: Block, members: Sequence[Assignment], schemes: Sequence[Scheme], stats: Stats | None
) -> Iterator[tuple[str, Scheme, Tensor]]:
    rows = [a.shape[0] for a in members]
    weight = torch.cat([block.skeleton.weight(a.module).float() for a in members])
    each = [replace(members[0], shape=(sum(rows), members[0].shape[1]), scheme=scheme) for scheme in schemes]
    choices = blocks.choose(each, [weight] * len(each), stats)
    del weight
    for scheme in schemes:
        values = choices.pop(0).weight.dequantize().split(rows)
        for assignment, own in zip(members, values, strict=True):
            yield assignment.module, scheme, own


@contextmanager
def _same_inputs(block: Block, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Inside this context, running the block fills a dictionary: linear -> its unit.

    Linears of one module that read the same tensor are a unit (q, k and v; gate and up): servers compute them as one.
    So are all experts of a layer.
    """
    units: dict[str, str] = {}
    read: dict[str, tuple[Tensor, str]] = {}  # module -> the tensor that its linears read last, and the first reader

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        parent = name.rpartition(".")[0]

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in units:
                same = parent in read and read[parent][0] is args[0]
                read[parent] = (args[0], read[parent][1] if same else name)
                units[name] = read[parent][1]

        return record

    modules = {name: block.skeleton.model.get_submodule(name) for name in names if not experts.is_of_expert(name)}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield units
    finally:
        for handle in handles:
            handle.remove()
        for name in names:
            if experts.is_of_expert(name):
                units[name] = f"{name.rpartition('experts.')[0]}experts"


def _of_head(
    settled: Settled,
    options: Mapping[str, Sequence[Scheme]],
    sweep: Sweep,
    end: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, dict[str, float]]:
    """The KL divergence of the logits with a quantized head, in nats over all tokens; nothing for other formats.

    It is measured on the first `_TOKENS_OF_HEAD` tokens. The quantized heads wait packed, so that the original's logits
    are computed once; one at a time is decoded.
    """
    head: Any = settled.skeleton.model.get_output_embeddings()
    names = {id(module): name for name, module in settled.skeleton.model.named_modules()}
    own = names.get(id(head), "")
    owner = settled.skeleton.tied.get(f"{own}.weight", f"{own}.weight").removesuffix(".weight")
    outside = {a.module: a for a in settled.outside}
    if head is None or owner not in outside or owner not in options:
        return {}
    weight, found, measured = head.weight.data, dict[str, float](), 0
    packed = {str(scheme): list(_packed(replace(outside[owner], scheme=scheme), weight)) for scheme in options[owner]}
    values = torch.empty_like(weight)
    with torch.no_grad():
        for tokens, states in zip(sweep.batches, sweep.last, strict=True):
            if measured >= _TOKENS_OF_HEAD:
                break
            states, measured = states.to(weight.device), measured + tokens.numel()
            exact = end(tokens, states)
            for scheme, parts in packed.items():
                head.weight.data = _decoded(parts, values)
                found[scheme] = found.get(scheme, 0.0) + nats_between(exact, end(tokens, states))
            head.weight.data = weight
    return {owner: {scheme: cost * sweep.tokens.numel() / measured for scheme, cost in found.items()}}


def _of_embedding(
    settled: Settled, options: Mapping[str, Sequence[Scheme]], sweep: Sweep
) -> dict[str, dict[str, float]]:
    """The costs of the token embedding in nats over all tokens; nothing if it is not quantized."""
    skeleton = settled.skeleton
    embedding: Any = skeleton.model.get_input_embeddings()
    names = {id(module): name for name, module in skeleton.model.named_modules()}
    own = names.get(id(embedding), "")
    outside = {a.module: a for a in settled.outside}
    if own not in outside or own not in options:
        return {}
    stored = skeleton.checkpoint.get(skeleton.key_of(f"{own}.weight"))
    weight = stored.to(skeleton.device, skeleton.dtype)
    rows = torch.cat([each.flatten() for each in sweep.batches]).unique().to(weight.device)
    values = weight

    def swap(module: nn.Module, args: tuple[Any, ...]) -> None:
        embedding.weight.data = values

    handle, found = embedding.register_forward_pre_hook(swap), dict[str, float]()
    try:
        exact, _ = skeleton.capture(sweep.batches)
        values, read = weight.clone(), weight[rows]
        for scheme in options[own]:
            parts = _packed(replace(outside[own], scheme=scheme), read)
            values[rows] = _decoded(parts, torch.empty_like(read))
            other, _ = skeleton.capture(sweep.batches)
            error = [a.float() - b.float() for a, b in zip(exact, other, strict=True)]
            pairs = zip(error, sweep.gradient, strict=True)
            found[str(scheme)] = 0.5 * sum(float((e * g.float()).square().sum()) for e, g in pairs)
    finally:
        handle.remove()
    return {own: found}


def _packed(assignment: Assignment, weight: Tensor) -> Iterator[tuple[slice, QTensor]]:
    """(rows, their quantized weight) of a weight outside the blocks, as `blocks` does it: without statistics of its
    inputs."""
    alike = Stats.from_mean_square(torch.ones(weight.shape[1], device=weight.device, dtype=torch.float32), 1)
    for rows in chunk_rows(len(weight), weight.shape[1], 1 << 22, assignment.scheme.rows or 1):
        yield rows, blocks.choose([assignment], [weight[rows].float()], alike)[0].weight


def _decoded(pieces: Iterable[tuple[slice, QTensor]], out: Tensor) -> Tensor:
    """`out`, filled with the values of all pieces."""
    for rows, piece in pieces:
        out[rows] = piece.dequantize().to(out.dtype)
    return out
