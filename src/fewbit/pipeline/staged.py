"""The stages in which a block's linears are measured and quantized.

Without targets there is one stage. With targets (`methods/targets.py`) there are about three: q, k, v; o, gate, up;
down. Each linear then corrects the error of those before it in the block too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from fewbit.models import experts
from fewbit.models.experts import inputs_of
from fewbit.pipeline import capture
from fewbit.pipeline.capture import Block, Stages
from fewbit.pipeline.groups import distinct_inputs
from fewbit.pipeline.original import Comparison, Original
from fewbit.stats import Need, Stats


def staged(block: Block, needs: Mapping[str, Need], stages: Stages | None) -> Iterator[Iterator[dict[str, Stats]]]:
    """Statistics of a block's linears: for each stage, those of one group of its linears after another.

    The caller replaces the weights of a stage before it takes the next stage, and not within a stage. So the groups
    limit the memory of the statistics and do not change the result.
    """
    need, original = max(needs.values(), default=Need.NOTHING), block.original
    if original is not None and need >= Need.SHIFT:
        yield from _compared(block, original, needs, stages)
        return
    if original is not None and not original.advanced:
        original.advance(block.skeleton, block.run)
    for names in _stages(block, needs, stages):
        groups = capture.grouped(block, names, need)
        pools = capture.gather_pools(block, names, need) if len(groups) > 1 else None
        yield (capture.gather(block, dict.fromkeys(group, need), pools=pools) for group in groups)


def _compared(
    block: Block, original: Original, needs: Mapping[str, Need], stages: Stages | None
) -> Iterator[Iterator[dict[str, Stats]]]:
    """`staged`, with shifts. They are measured with the quantized weights of the linears before, so that down corrects
    the error of gate and up too: at 3 bits the KL divergence of the embedded model is 10 % lower. Hessians are measured
    as without shifts.
    """
    need, same = max(needs.values()), original.same_as(block.hidden)
    _keep_reads(block, original, needs)
    if not original.advanced:
        original.advance(block.skeleton, block.run)
    whole: dict[str, Stats] = {}
    if stages is None and len(capture.grouped(block, list(needs), need)) == 1:
        whole = capture.gather(block, dict.fromkeys(needs, Need.HESSIAN))
    original.weights_needed = (stages is None and not whole) or not original.reads
    every = _merged(_by_tensor(whole or _read_by(block, needs))) if stages is None else _stages(block, needs, stages)
    for number, names in enumerate(every, 1):
        groups = capture.grouped(block, names, need)
        differs = number > 1 or not same  # in the first block, both models have the same states
        compared = [name for name in names if needs[name] >= Need.SHIFT] if differs else []
        if whole:
            found: Iterator[dict[str, Stats]] = ({n: whole.pop(n) for n in group if n in whole} for group in groups)
        else:
            found = _hessians(block, groups, names, original if stages is None else None)
        yield map(partial(_with_shifts, block, compared), found)


def _hessians(
    block: Block, groups: list[list[str]], names: list[str], original: Original | None
) -> Iterator[dict[str, Stats]]:
    """The Hessians of one group of linears after another; with the weights of the `original` model, if given."""
    pools: capture.Pools | None = None
    for group in groups:
        with nullcontext() if original is None else original.weights(block.skeleton):
            if len(groups) > 1 and pools is None:
                pools = capture.gather_pools(block, names, Need.HESSIAN)
            found = capture.gather(block, dict.fromkeys(group, Need.HESSIAN), pools=pools)
        yield found


def _with_shifts(block: Block, compared: Sequence[str], stats: dict[str, Stats]) -> dict[str, Stats]:
    """`stats`, with the shifts of the linears `compared` among them."""
    add_shifts(block, {name: stats[name] for name in compared if name in stats})
    return stats


def _keep_reads(block: Block, original: Original, needs: Mapping[str, Need]) -> None:
    """Keep what the linears of the original model read, if there is room. Otherwise each stage runs it once more."""
    comparison = Comparison(original, block.skeleton, block.run, needs, inputs_of(block.name, block.module))
    linears = {name: shape for name, shape in block.skeleton.linears(block.name).items() if name in comparison.names}
    values = sum(states[..., 0].numel() for states in original.states) * sum(distinct_inputs(linears))
    if values * block.hidden[0].element_size() <= capture.room(block.skeleton):
        with torch.no_grad(), experts.watched(block.name, block.module):
            comparison.keep_all()


def add_shifts(block: Block, stats: Mapping[str, Stats]) -> None:
    """Add the shifts of these linears' inputs to their statistics."""
    inputs = inputs_of(block.name, block.module)
    stats = {name: each for name, each in stats.items() if name not in inputs or not inputs[name].is_inner}
    if not stats:
        return
    capture.Gathering.of_shifts(block, stats).run()
    for each in {id(each): each for each in stats.values()}.values():
        each.all_reduce_shift()


def _stages(block: Block, needs: Mapping[str, Need], stages: Stages | None) -> list[list[str]]:
    """The linears of each stage."""
    if stages is None:
        return [list(needs)]
    if stages:
        return [[name for name in needs if name.removeprefix(f"{block.name}.") in stage] for stage in stages]
    return _by_tensor(_read_by(block, needs))


def _merged(every: list[list[str]]) -> list[list[str]]:
    """Fewer stages, which are as good, and take less time: q, k, v; o, gate, up; down."""
    modules = [{experts.of_any(name).rpartition(".")[0] for name in names} for names in every]
    merged: list[list[str]] = []
    current: set[str] = set()
    for number, names in enumerate(every):
        later = set[str]().union(*modules[number + 1 :])
        if not merged or modules[number] & current - later:  # the last linears of a module read what it computed
            merged.append([])
            current = set()
        merged[-1] += names
        current |= modules[number]
    return merged


def _read_by(block: Block, needs: Mapping[str, Need]) -> Mapping[str, Stats]:
    """Cheap statistics, to see which linears read the same tensor. One batch is enough, if it reaches every linear."""
    first = replace(block, calls=block.calls[:1], hidden=block.hidden[:1])
    found = capture.gather(first, dict.fromkeys(needs, Need.MEAN_ABS))
    return found if len(found) == len(needs) else capture.gather(block, dict.fromkeys(needs, Need.MEAN_ABS))


def _by_tensor(stats: Mapping[str, Stats]) -> list[list[str]]:
    """The linears that read the same tensor, in the order in which the block computes these tensors."""
    leaders: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, each in stats.items():
        # Experts do not read what other experts compute, so the same linears of all experts are one stage.
        found.setdefault(leaders.setdefault(id(each), experts.of_any(name)), []).append(name)
    return list(found.values())
