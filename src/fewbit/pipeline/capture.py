"""Statistics of the inputs of a block's linears, over the calibration batches of all ranks.

Hooks record the input of each linear when the block runs, so this works for any architecture. Linears that read the
same tensor share one object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import PlanError
from fewbit.models import experts
from fewbit.models.experts import ExpertInput, Routed, inputs_of
from fewbit.models.skeleton import BlockCall, Shape, Skeleton
from fewbit.pipeline import token_weights
from fewbit.pipeline.groups import groups_of, room_for_statistics
from fewbit.pipeline.original import AllFed, Comparison, Original, is_held_out
from fewbit.plans.plan import Assignment
from fewbit.stats import Need, Stats
from fewbit.system import machine, ranks

STRENGTH = 4  # n0 of `Pools`, in multiples of the number of columns
# Tokens of the text that is compared with the original model, but at least a quarter of the windows. The other windows
# do not run with the original weights, which takes as long as all the rest.
_COMPARED = 16384
_TOKENS_AT_ONCE = 2048  # enough to keep two cores busy, small beside the statistics
# With 2048, running and measuring a block of 8B's widths takes 1.29 s on an H200, with 8192 0.91 s
# (benchmarks/quantize_gpu.py, 128 x 2048 tokens).
_TOKENS_ON_GPU = 8192
# Launches take most of the time if an expert gets few tokens: statistics of a layer of Qwen3-30B-A3B's shape
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
    """A materialized block and its inputs: `hidden` has, for each of `calls`, states [sequences, tokens, width].

    original: the states of the original model, if a method compares the two.
    """

    skeleton: Skeleton
    name: str
    module: nn.Module
    calls: list[BlockCall]
    hidden: list[Tensor]
    original: Original | None = None

    def run(self, batch: int, states: Tensor) -> Tensor:
        return self.calls[batch].run(self.module, states)

    def replay(self) -> None:
        """Replace the hidden states by the block's outputs, and those of the original model by its own."""
        with torch.no_grad():
            for i in range(len(self.calls)):
                self.hidden[i] = self.run(i, self.hidden[i])
        if self.original is not None:
            self.original.next_block()


def tokens_at_once(skeleton: Skeleton, assignments: Iterable[Assignment] = ()) -> int:
    """The number of tokens in a batch. A rewrite (AWQ) searches on one batch at least, which must be small."""
    if skeleton.device.type != "cuda" or any(a.method.rewrites for a in assignments):
        return _TOKENS_AT_ONCE
    return _TOKENS_FOR_EXPERTS if experts.are_separate(skeleton.model) else _TOKENS_ON_GPU


def captured(
    skeleton: Skeleton, inputs: Inputs, *, compares: bool = False
) -> tuple[list[Tensor], dict[str, list[BlockCall]]]:
    """`Skeleton.capture` for this rank's share of the windows, in batches of `inputs.at_once`.

    compares: whether the first batches are compared with the original model, see `original_of`.
    """
    tokens = inputs.tokens
    assert tokens is not None
    if len(tokens) < ranks.size():
        raise PlanError(
            f"the calibration text has fewer windows ({len(tokens)}) than there are processes ({ranks.size()})",
            "Give more `samples`, or start fewer processes.",
        )
    if not compares:
        own = ranks.part(len(tokens))
        return skeleton.capture(list(tokens[own.start : own.stop].split(inputs.at_once)))
    first, others = _batches(inputs)
    return skeleton.capture([tokens[windows] for windows in (*first, *others)])


def _batches(inputs: Inputs) -> tuple[list[list[int]], list[list[int]]]:
    """The numbers of this rank's windows, in batches: those that are compared with the original model, and the others.

    They depend on the number of windows only, so that any number of ranks compares the same.
    """
    assert inputs.tokens is not None
    step, own = _compared_step(inputs.tokens), ranks.part(len(inputs.tokens))
    parts = [window for window in own if window % step == 0], [window for window in own if window % step]
    at_once = inputs.at_once
    first, others = ([part[i : i + at_once] for i in range(0, len(part), at_once)] for part in parts)
    return first, others


def _compared_step(tokens: Tensor) -> int:
    """The step between the windows that are compared with the original model: see `_COMPARED`."""
    return max(1, min(4, tokens.numel() // _COMPARED))


def held_out_windows(tokens: Tensor) -> list[int]:
    """The windows of `tokens` [windows, length] that are held out of what is compared with the original model."""
    compared = range(0, len(tokens), _compared_step(tokens))
    return [window for number, window in enumerate(compared) if is_held_out(number, len(compared))]


def original_of(inputs: Inputs, hidden: Sequence[Tensor]) -> Original:
    """The original model's states at the first block's input: the first of `hidden`, as `captured` returns them."""
    assert inputs.tokens is not None
    step, (first, _) = _compared_step(inputs.tokens), _batches(inputs)
    windows = [[window // step for window in batch] for batch in first]
    return Original(list(hidden[: len(first)]), windows, len(range(0, len(inputs.tokens), step)))


def grouped(block: Block, names: Sequence[str], need: Need) -> list[list[str]]:
    """`names` in groups whose statistics take at most `room_for_statistics` bytes, or that hold one module's linears.

    Each group costs one more run of the block over the calibration tokens.
    """
    every = block.skeleton.linears(block.name)
    return groups_of({name: every[name] for name in names}, need, room(block.skeleton))


def room(skeleton: Skeleton) -> int:
    """The budget for statistics, in bytes."""
    return room_for_statistics(machine.memory_of(skeleton.device))


def needs_of(assignments: Mapping[str, Assignment]) -> dict[str, Need]:
    """The input statistics that the methods of these linears need. Linears that need none are left out."""
    return {name: a.need for name, a in assignments.items() if a.need > Need.NOTHING}


def gather(
    block: Block, needs: Mapping[str, Need], *, alike: bool = False, pools: Pools | None = None
) -> dict[str, Stats]:
    """Statistics of each linear's input over all batches. Linears that read the same tensor share one object.

    A token is weighted by the norm of its hidden state (`token_weights.py`); with `alike`, all weights are equal.
    Models use a few tokens of very large norm as attention sinks. All other tokens attend to these, so an error in them
    spreads. On the demo model at 4 bits the weighting lowers the KL divergence by 13 % (0.184 to 0.160); with the
    squared norm as weight it is 0.181.

    Experts: see `Pools`. `pools` are those of the whole stage, if `needs` holds only a group of its experts.
    """
    need = max(needs.values(), default=Need.NOTHING)
    into = Into.LINEARS if alike or pools is not None else Into.LINEARS | Into.LAYERS
    gathering = Gathering(block, need, needs, alike=alike, into=into)
    gathering.run()
    stats = gathering.of_all_ranks()
    if not alike:
        (gathering.pools() if pools is None else pools).complete(stats, gathering.expert_inputs)
    return stats


@dataclass(frozen=True)
class Pools:
    """Statistics of an input of all experts of a layer together: that of gate and up, or that of down.

    An expert with n rows and statistics H of its own gets (n H + n0 H_pool) / (n + n0), where n0 is four times the
    number of columns. An expert that no token reached gets H_pool.

    KL divergence of tiny-moe, if only the experts of three layers are quantized, to int3-g128 by GPTQ (16 x 512 tokens;
    round to nearest: 0.01630; tiny-moe has K = 256 and 16 experts, of which 2 serve a token):

        calibration tokens               8192       32768
        own H, all rows alike            0.00919    0.00742
        own H                            0.00932
        n0 = 4 K                         0.00809    0.00737
        n0 = 4 K, rows weighted by p     .          0.00733
        n0 = 4 K, rows weighted by p²    0.00826    0.00751
        n0 = K, p²                       0.00848
        n0 = 0, p²                       0.01021
        H_pool alone, p²                 0.00919
        all tokens to all experts        0.00883

    p is the router's weight, which multiplies the expert's output: Σ p² x xᵀ is the exact weight of an error in that
    output. But it leaves fewer effective rows, and does not lower the KL divergence. So rows weigh as their tokens.
    """

    of: Mapping[tuple[str, bool], Stats]

    def complete(self, stats: Mapping[str, Stats], inputs: Mapping[str, ExpertInput]) -> None:
        """Shrink the statistics of experts, in place."""
        done = set[int]()
        for name, own in stats.items():
            if name in inputs and id(own) not in done:
                done.add(id(own))
                pool = self.of[inputs[name].pool]
                own.shrink(pool, STRENGTH * pool.columns)


def gather_pools(block: Block, names: Sequence[str], need: Need) -> Pools:
    """The statistics that the experts with the linears `names` share. The statistics of single experts are not kept."""
    gathering = Gathering(block, need, filter(experts.is_of_expert, names), into=Into.LAYERS)
    if gathering.names:  # else the block has no experts, or this stage none of them
        gathering.run()
    return gathering.pools()


class Into(Flag):
    """Statistics that the inputs of experts are added to: those of each linear, and the pools of each layer."""

    LINEARS = auto()
    LAYERS = auto()


class Gathering:
    """Runs a block over its calibration inputs, and adds what the linears `names` read to statistics.

    into: the statistics that an input is added to.
    """

    def __init__(
        self,
        block: Block,
        need: Need,
        names: Iterable[str],
        *,
        into: Into,
        alike: bool = False,
    ) -> None:
        self._given: Mapping[str, Stats] | None = None
        self.block, self.need, self.alike, self.into = block, need, alike, into
        self.shapes, self.names = block.skeleton.linears(block.name), list(names)
        self.stats: dict[str, Stats] = {}
        self.reads: dict[str, str] = {}  # linear -> the first linear that reads the same tensor
        every = inputs_of(block.name, block.module)
        self.expert_inputs = {name: every[name] for name in self.names if name in every}
        self._pools: dict[tuple[str, bool], Stats] = {}
        first: dict[ExpertInput, str] = {}
        self._leaders = {name: first.setdefault(each, name) for name, each in self.expert_inputs.items()}
        for name in first.values():
            pool = self.expert_inputs[name].pool
            if Into.LAYERS in into and pool not in self._pools:
                self._pools[pool] = self._empty(name)
            if Into.LINEARS in into:
                self.stats[name] = self._empty(name)
        self._seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._weight: Tensor | None = None  # of the batch's tokens [windows, tokens]
        self._comparison: Comparison | None = None
        self._fed: list[str] = []  # linears, in the order in which the batch reached them
        self._last: str | None = None

    @classmethod
    def of_shifts(cls, block: Block, stats: Mapping[str, Stats]) -> Gathering:
        """One that adds the shifts of the linears' inputs to `stats`."""
        gathering = cls(block, Need.SHIFT, stats, into=Into(0))
        assert block.original is not None
        gathering._comparison = Comparison(
            block.original, block.skeleton, block.run, gathering.names, gathering.expert_inputs
        )
        gathering._given = stats
        gathering.stats = {leader: stats[leader] for leader in gathering._leaders.values()}
        return gathering

    def run(self) -> None:
        block = self.block
        modules = {name: block.skeleton.model.get_submodule(name) for name in self.names}
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]
        try:
            with (
                torch.no_grad(),
                experts.watched(block.name, block.module),
            ):
                compared = None if self._comparison is None else len(self._comparison.original.states)
                for batch, states in enumerate(block.hidden[:compared]):
                    self._weight = None if self.alike else token_weights.of_tokens(states)
                    if self._comparison is not None:
                        self._comparison.run(batch, self._last)
                    with suppress(AllFed), experts.only_of(block.name, block.module, self.names):
                        block.run(batch, states)
                    if self._last is None and sorted(self._fed) == sorted(self.names):
                        # Each was called once. The last that reads a tensor of its own is the last to be measured.
                        self._last = next(name for name in reversed(self._fed) if self.reads[name] == name)
                    self._fed.clear()
        finally:
            for handle in handles:
                handle.remove()

    def pools(self) -> Pools:
        for stats in self._pools.values():
            stats.all_reduce()
        return Pools(self._pools)

    def of_all_ranks(self) -> dict[str, Stats]:
        """The statistics over all ranks, for each linear that any rank's batches reached, and for all experts."""
        for name, leader in self._leaders.items():
            self.reads.setdefault(name, leader)
        return _of_all_ranks(self.block.skeleton, self.reads, self.stats, self.shapes, self.need)

    def _empty(self, name: str) -> Stats:
        return Stats(self.shapes[name][1], self.need, self.block.skeleton.device)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        record = self._record_expert if name in self.expert_inputs else self._record

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self._comparison is not None and self._comparison.running:
                return
            record(name, args[0])
            self._fed.append(name)
            if name == self._last:
                raise AllFed

        return hook

    def _record(self, name: str, x: Tensor) -> None:
        if name not in self.reads:
            before = self._seen.get(id(x))
            same = before is not None and before[0]() is x
            self.reads[name] = before[1] if before is not None and same else name
            if not same:
                self._seen[id(x)] = (weakref.ref(x), name)
            if self.reads[name] == name:
                self.stats[name] = self._empty(name) if self._given is None else self._given[name]
        if self.reads[name] == name:
            weight = None if self._weight is None else token_weights.of_rows(x, self._weight)
            if self._comparison is None:
                self.stats[name].add(x, weight)
            elif (rows := self._comparison.of(name, x)) is not None:
                self.stats[name].add_shift(x, *rows, weight)

    def _record_expert(self, name: str, x: Tensor) -> None:
        self.reads[name] = self._leaders[name]
        if self.reads[name] != name:
            return
        each = self.expert_inputs[name]
        routed = each.module.routed
        of_tokens = None if self._weight is None else self._weight.flatten()
        x, weight, tokens = _routed(routed, x, of_tokens)
        if self._comparison is not None:
            rows = None
            if routed is not None and tokens is not None:
                rows = self._comparison.of_expert(name, tokens, routed.of)
            if rows is not None:
                self.stats[name].add_shift(x, *rows, weight)
            return
        if each.pool in self._pools:
            self._pools[each.pool].add(x, weight)
        if Into.LINEARS in self.into:
            self.stats[name].add(x, weight)


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
        if leader not in stats:  # no batch of this rank reached it
            stats[leader] = Stats(shapes[leader][1], need, skeleton.device)
        stats[leader].all_reduce()
    return {name: stats[leader] for name, leader in leaders.items()}


def _of_tokens(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weights of tokens, if the rows of x are all tokens. Some models flatten [batch, tokens]."""
    return weight if weight is not None and weight.numel() == x.numel() // x.shape[-1] else None


def _routed(routed: Routed | None, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of x [n, K] that count for an expert, their weights [n] and their places among the layer's tokens [n].

    The weights are those of the tokens. routed: None for a layer that does not say which tokens its experts read: see
    `_of_tokens`.
    """
    if routed is None:
        return x, _of_tokens(x, weight), None
    chosen = routed.shares != 0
    tokens = routed.tokens
    if not chosen.all():
        x, tokens = x[chosen], tokens[chosen]
    return x, weight[tokens] if weight is not None and len(weight) == routed.of else None, tokens
