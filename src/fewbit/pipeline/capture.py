"""Statistics of the inputs of a block's linears, over the calibration batches of all ranks.

Hooks record the input of each linear when the block runs, so this works for any architecture. Linears that read the
same tensor share one object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import PlanError
from fewbit.models import experts
from fewbit.models.skeleton import BlockCall, Shape, Skeleton
from fewbit.pipeline.groups import groups_of, room_for_statistics
from fewbit.plans.plan import Assignment
from fewbit.stats import Need, Stats
from fewbit.system import machine, ranks

_TOKENS_AT_ONCE = 2048  # enough to keep two cores or a GPU busy, small beside the statistics
# On a GPU, launches take most of the time if an expert gets few tokens: statistics of a layer of Qwen3-30B-A3B's shape
# took 11.5 s with 2048 tokens at once, 2.8 s with 16384 (benchmarks/experts.py, 128 x 2048 tokens).
_TOKENS_FOR_EXPERTS = 32768

Importance = Mapping[str, Stats]
Stages = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Inputs:
    """The calibration inputs, and how statistics are gathered.

    tokens: int64 [samples, length], the calibration windows, if a method needs them. importance: linear -> statistics
    that replace them. stages: lists of linears, by their names in the block; the statistics of each stage are measured
    with the quantized weights of the stages before. An empty list: one stage for each tensor that linears read. None:
    all statistics are measured with the unquantized block. least, most: bounds of the number of windows in a batch,
    which has about `tokens_at_once` tokens.
    """

    tokens: Tensor | None = None
    importance: Importance | None = None
    stages: Stages | None = None
    least: int = 1
    most: int | None = None
    tokens_at_once: int = _TOKENS_AT_ONCE

    @property
    def at_once(self) -> int:
        """Number of windows in a batch."""
        if self.tokens is None:
            return 1
        count, length = self.tokens.shape
        return max(1, min(count, self.most or count, max(self.least, self.tokens_at_once // length)))

    def halved(self) -> Inputs:
        """A copy with half as many windows in a batch."""
        assert self.tokens is not None
        most = max(self.least, self.tokens_at_once // self.tokens.shape[1])
        while most >= self.at_once:
            most //= 2
        return replace(self, most=max(1, most))


@dataclass(frozen=True)
class Block:
    """A materialized block and its inputs: `hidden` has, for each of `calls`, states [sequences, tokens, width]."""

    skeleton: Skeleton
    name: str
    module: nn.Module
    calls: list[BlockCall]
    hidden: list[Tensor]

    def replay(self) -> None:
        """Replace the hidden states by the block's outputs."""
        with torch.no_grad():
            for i, call in enumerate(self.calls):
                self.hidden[i] = call.run(self.module, self.hidden[i])


def tokens_at_once(skeleton: Skeleton, assignments: Iterable[Assignment] = ()) -> int:
    """The number of tokens in a batch. A rewrite (AWQ) searches on one batch at least, which must be small."""
    many = skeleton.device.type == "cuda" and experts.are_separate(skeleton.model)
    return _TOKENS_FOR_EXPERTS if many and not any(a.method.rewrites for a in assignments) else _TOKENS_AT_ONCE


def captured(skeleton: Skeleton, inputs: Inputs) -> tuple[list[Tensor], dict[str, list[BlockCall]]]:
    """`Skeleton.capture` for this rank's share of the windows, in batches of `inputs.at_once`."""
    tokens = inputs.tokens
    assert tokens is not None
    if len(tokens) < ranks.size():
        raise PlanError(
            f"the calibration text has fewer windows ({len(tokens)}) than there are processes ({ranks.size()})",
            "Give more `samples`, or start fewer processes.",
        )
    own = ranks.part(len(tokens))
    return skeleton.capture(list(tokens[own.start : own.stop].split(inputs.at_once)))


def staged(block: Block, needs: Mapping[str, Need], stages: Stages | None) -> Iterator[Iterator[dict[str, Stats]]]:
    """Statistics of a block's linears: for each stage, those of one group of its linears after another.

    The caller replaces the weights of a stage before it takes the next stage, and not within a stage. So the groups
    limit the memory of the statistics and do not change the result.
    """
    need = max(needs.values(), default=Need.NOTHING)
    for names in _stages(block, needs, stages):
        yield (gather(block, dict.fromkeys(group, need)) for group in _grouped(block, names, need))


def _stages(block: Block, needs: Mapping[str, Need], stages: Stages | None) -> list[list[str]]:
    """The linears of each stage."""
    if stages is None:
        return [list(needs)]
    if stages:
        return [[name for name in needs if name.removeprefix(f"{block.name}.") in stage] for stage in stages]
    leaders: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, stats in gather(block, dict.fromkeys(needs, Need.MEAN_ABS)).items():
        # Experts do not read what other experts compute, so the same linears of all experts are one stage.
        found.setdefault(leaders.setdefault(id(stats), experts.of_any(name)), []).append(name)
    return list(found.values())


def _grouped(block: Block, names: Sequence[str], need: Need) -> list[list[str]]:
    """`names` in groups whose statistics take at most `room_for_statistics` bytes, or that hold one module's linears.

    Each group costs one more run of the block over the calibration tokens.
    """
    every, room = block.skeleton.linears(block.name), room_for_statistics(machine.memory_of(block.skeleton.device))
    return groups_of({name: every[name] for name in names}, need, room)


def needs_of(assignments: Mapping[str, Assignment]) -> dict[str, Need]:
    """The input statistics that the methods of these linears need. Linears that need none are left out."""
    return {name: a.method.needs for name, a in assignments.items() if a.method.needs > Need.NOTHING}


class _AllFed(Exception):
    """Raised when the last linear of a block has its input, to skip the rest of the block (a tenth of the time)."""


def gather(block: Block, needs: Mapping[str, Need], *, alike: bool = False) -> dict[str, Stats]:
    """Statistics of each linear's input over all batches. Linears that read the same tensor share one object.

    A token is weighted by the norm of its hidden state at the block's input; with `alike`, all weights are equal.
    Models use a few tokens of very large norm as attention sinks. All other tokens attend to these, so an error in them
    spreads. On the demo model at 4 bits the weighting lowers the KL divergence by 13 % (0.184 to 0.160); with the
    squared norm as weight it is 0.181.
    """
    stats: dict[str, Stats] = {}
    seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    reads: dict[str, str] = {}  # linear -> the first linear that reads the same tensor
    fed: list[str] = []  # linears, in the order in which the first batch reached them
    last: str | None = None
    weight: Tensor | None = None
    skeleton = block.skeleton
    shapes = skeleton.linears(block.name)

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
                # Some models flatten [batch, tokens]. If rows are not tokens (routed experts), all weights are equal.
                tokens = weight is not None and weight.numel() == x.numel() // x.shape[-1]
                stats[name].add(x, weight if tokens else None)
            fed.append(name)
            if name == last:
                raise _AllFed

        return record

    handles = [skeleton.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in needs]
    try:
        with torch.no_grad(), experts.only_of(block.name, block.module, needs):
            for call, states in zip(block.calls, block.hidden, strict=True):
                weight = None if alike else states.float().norm(dim=-1).clamp(min=1e-6)
                with suppress(_AllFed):
                    call.run(block.module, states)
                if last is None and sorted(fed) == sorted(needs):  # each was called once, so this is the last
                    last = fed[-1]
                fed.clear()
    finally:
        for handle in handles:
            handle.remove()
    return _of_all_ranks(skeleton, reads, stats, shapes, max(needs.values(), default=Need.NOTHING))


def _of_all_ranks(
    skeleton: Skeleton, reads: Mapping[str, str], stats: dict[str, Stats], shapes: Mapping[str, Shape], need: Need
) -> dict[str, Stats]:
    """The statistics over all ranks, for each linear that any rank's batches reached.

    `reads`: linear -> the first linear that reads the same tensor; `stats` has the statistics under that name.
    """
    leaders: dict[str, str] = {}
    for own in ranks.all_gather(dict(reads)):
        for name, leader in own.items():
            leaders.setdefault(name, leader)
    for leader in dict.fromkeys(leaders.values()):
        if leader not in stats:  # a routed expert that no token of this rank reached
            stats[leader] = Stats(shapes[leader][1], need, skeleton.device)
        stats[leader].all_reduce()
    return {name: stats[leader] for name, leader in leaders.items()}
