"""Statistics of the inputs of a block's linears, over the calibration batches of all ranks.

Hooks record the input of each linear when the block runs, so this works for any architecture. Linears that read the
same tensor share one object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fewbit.pipeline.groups import groups_of, room_for_statistics
from fewbit.pipeline.original import AllFed, Comparison, Original
from fewbit.plans.plan import Assignment
from fewbit.stats import Need, Stats
from fewbit.system import machine, ranks

STRENGTH = 4  # n0 of `Pools`, in multiples of the number of columns
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
    """A materialized block and its inputs: `hidden` has, for each of `calls`, states [sequences, tokens, width].

    original: the same of the original model, if a method compares the two.
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


def original_of(inputs: Inputs, hidden: Sequence[Tensor]) -> Original:
    """The original model's states at the first block's input, which are `hidden`, as `captured` returns them."""
    assert inputs.tokens is not None
    own = ranks.part(len(inputs.tokens))
    windows = [own[i : i + inputs.at_once] for i in range(0, len(own), inputs.at_once)]
    return Original(list(hidden), windows, len(inputs.tokens))


def staged(block: Block, needs: Mapping[str, Need], stages: Stages | None) -> Iterator[Iterator[dict[str, Stats]]]:
    """Statistics of a block's linears: for each stage, those of one group of its linears after another.

    The caller replaces the weights of a stage before it takes the next stage, and not within a stage. So the groups
    limit the memory of the statistics and do not change the result.
    """
    need, original = max(needs.values(), default=Need.NOTHING), block.original
    every = _stages(block, needs, stages) or [[]]
    for number, names in enumerate(every, 1):
        groups, final = _grouped(block, names, need), number == len(every)
        here = min(need, Need.HESSIAN) if original is not None and original.same_as(block.hidden) else need
        computes = len(groups) == 1 and here >= Need.SHIFT  # whether `gather` computes the original model's output
        if original is not None and final and not computes and not original.advanced:
            original.advance(block.skeleton, block.run)
        pools = gather_pools(block, names, here) if len(groups) > 1 else None
        yield (gather(block, dict.fromkeys(group, here), pools=pools, final=final) for group in groups)


def _stages(block: Block, needs: Mapping[str, Need], stages: Stages | None) -> list[list[str]]:
    """The linears of each stage.

    A shift is measured with the quantized weights of the linears before, so that down also corrects the error of gate
    and up: at 3 bits the KL divergence of the embedded model is 10 % lower. Three stages are as good as four, and take
    less time: q, k, v; o, gate, up; down.
    """
    if stages:
        return [[name for name in needs if name.removeprefix(f"{block.name}.") in stage] for stage in stages]
    if stages is not None:
        return _by_tensor(block, needs)
    if max(needs.values(), default=Need.NOTHING) < Need.SHIFT:
        return [list(needs)]
    every = _by_tensor(block, needs)
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


def _by_tensor(block: Block, needs: Mapping[str, Need]) -> list[list[str]]:
    """The linears that read the same tensor, in the order in which the block computes these tensors."""
    found: dict[str, list[str]] = {}
    # One batch says who reads what, unless it leaves out a linear.
    for part in (replace(block, calls=block.calls[:1], hidden=block.hidden[:1], original=None), block):
        leaders: dict[int, str] = {}
        found.clear()
        for name, stats in gather(part, dict.fromkeys(needs, Need.MEAN_ABS)).items():
            # Experts do not read what other experts compute, so the same linears of all experts are one stage.
            found.setdefault(leaders.setdefault(id(stats), experts.of_any(name)), []).append(name)
        if sum(map(len, found.values())) == len(needs):
            break
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


def gather(
    block: Block, needs: Mapping[str, Need], *, alike: bool = False, pools: Pools | None = None, final: bool = True
) -> dict[str, Stats]:
    """Statistics of each linear's input over all batches. Linears that read the same tensor share one object.

    A token is weighted by the norm of its hidden state at the block's input; with `alike`, all weights are equal.
    Models use a few tokens of very large norm as attention sinks. All other tokens attend to these, so an error in them
    spreads. On the demo model at 4 bits the weighting lowers the KL divergence by 13 % (0.184 to 0.160); with the
    squared norm as weight it is 0.181.

    Experts: see `Pools`. `pools` are those of the whole stage, if `needs` holds only a group of its experts. final:
    whether this is the last stage of the block, which computes the original model's output too.
    """
    need = max(needs.values(), default=Need.NOTHING)
    into = _Into.LINEARS if alike or pools is not None else _Into.LINEARS | _Into.LAYERS
    gathering = _Gathering(block, need, needs, alike=alike, into=into)
    gathering.run(final=final)
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
    gathering = _Gathering(block, need, filter(experts.is_of_expert, names), into=_Into.LAYERS)
    if gathering.names:  # else the block has no experts, or this stage none of them
        gathering.run()
    return gathering.pools()


class _Into(Flag):
    """Statistics that the inputs of experts are added to: those of each linear, and the pools of each layer."""

    LINEARS = auto()
    LAYERS = auto()


class _Gathering:
    """Runs a block over its calibration inputs, and adds what the linears `names` read to statistics.

    into: the statistics that an input is added to.
    """

    def __init__(
        self,
        block: Block,
        need: Need,
        names: Iterable[str],
        *,
        into: _Into,
        alike: bool = False,
    ) -> None:
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
            if _Into.LAYERS in into and pool not in self._pools:
                self._pools[pool] = self._empty(name)
            if _Into.LINEARS in into:
                self.stats[name] = self._empty(name)
        self._seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._weight: Tensor | None = None
        self._comparison: Comparison | None = None
        if block.original is not None and need >= Need.SHIFT:
            self._comparison = Comparison(block.original, block.skeleton, block.run, self.names, self.expert_inputs)
        self._fed: list[str] = []  # linears, in the order in which the batch reached them
        self._last: str | None = None

    def run(self, *, final: bool = False) -> None:
        block = self.block
        modules = {name: block.skeleton.model.get_submodule(name) for name in self.names}
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]
        try:
            with (
                torch.no_grad(),
                experts.watched(block.name, block.module),
            ):
                for batch, states in enumerate(block.hidden):
                    self._weight = None if self.alike else states.float().norm(dim=-1).clamp(min=1e-6).flatten()
                    if self._comparison is not None:
                        self._comparison.run(batch, last=self._last, final=final)
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
        """The statistics over all ranks, for each linear that any rank's batches reached.

        Without `alike` also for experts that no token reached: `Pools` completes them.
        """
        for name, leader in () if self.alike else self._leaders.items():
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
                self.stats[name] = self._empty(name)
        if self.reads[name] == name:
            original = (None, None) if self._comparison is None else self._comparison.of(name, x)
            self.stats[name].add(x, _of_tokens(x, self._weight), *original)

    def _record_expert(self, name: str, x: Tensor) -> None:
        self.reads[name] = self._leaders[name]
        if self.reads[name] != name:
            return
        each = self.expert_inputs[name]
        routed = each.module.routed
        x, weight, tokens = _routed(routed, x, self._weight)
        original: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._comparison is not None and routed is not None and tokens is not None:
            original = self._comparison.of_expert(name, tokens, routed.of)
        if each.pool in self._pools:
            self._pools[each.pool].add(x, weight, *original)
        if _Into.LINEARS in self.into:
            self.stats[name].add(x, weight, *original)


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
