"""Block-wise tuning: codes and scales of a block are trained on the output of the original model's block.

    minimize the mean over tokens of |f(x̃; W) - f(x; W0)|²

f is the block, W0 its original weights, x what it reads in the original model (`original.py`) and x̃ what it reads in
the quantized one. So a block also corrects a part of the error of the blocks before it. W starts as the codes and
scales that the plan's method chose (`nn/moved.py`).

Every eighth window is held out. The loss on these decides which state is kept, and, once it is rounded as its file
stores it, whether it is kept at all. Otherwise the block keeps its codes and scales, and a note says so.

Related: BRECQ (https://arxiv.org/abs/2102.05426), which tunes the rounding block by block, and the first phase of
EfficientQAT (https://arxiv.org/abs/2407.11062), which trains the weights too.

Memory, for each weight of the block: 24 bytes (the value, its position, the best position, gradient, two moments).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fewbit.errors import NumericsError
from fewbit.models.calls import first_line
from fewbit.models.linears import is_transposed
from fewbit.nn.moved import MovedStack, MovedWeight, alike
from fewbit.pipeline.capture import Block
from fewbit.pipeline.descent import Objective, descend
from fewbit.pipeline.optimization import Optimization
from fewbit.schemes.base import QTensor

STEPS = Optimization(steps=100, learning_rate=1e-3, batch=2048)


@dataclass(frozen=True)
class BlockTuning:
    """How blocks are tuned. seed: of the order of windows."""

    wanted: Optimization = STEPS
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.wanted} {self.seed}"


@dataclass
class Tuned:
    """A block after tuning. weights: by linear; None if tuning failed. moved: the share of each linear's codes that
    moved; None where codes stay."""

    weights: dict[str, QTensor] | None
    moved: dict[str, float | None]
    notes: list[str]


@dataclass(frozen=True)
class Problem:
    """A materialized block, and the outputs that it should have: one tensor for each of its first batches."""

    block: Block
    targets: Sequence[Tensor]

    def why_not(self) -> str | None:
        """None if the block can be tuned, else why not."""
        original = self.block.original
        assert original is not None
        if any(t.dim() != 3 or len(t) != len(w) for t, w in zip(self.targets, original.windows, strict=True)):
            return "its states are not [windows, tokens, width]"
        return "one calibration window leaves none to measure on" if original.total < 2 else None

    @cached_property
    def held_out(self) -> list[Tensor]:
        """For each batch, bool [windows]: which of its windows are held out."""
        original = self.block.original
        assert original is not None
        found = []
        for batch, target in enumerate(self.targets):
            windows = torch.arange(len(target), device=target.device, dtype=torch.int64)
            held = original.held_out(batch, windows, len(target))
            found.append(torch.zeros_like(windows, dtype=torch.bool) if held is None else held)
        return found

    def loss(self, batch: int, which: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The sum over the windows `which` bool [windows] of a batch of the mean squared error of the block's output.

        weights: linear -> weight [N, K] in place of that of the block.
        """
        out = self._run(batch, weights)
        error = (out.float() - self.targets[batch].float()).square().flatten(1).mean(1)
        return error[which].sum()

    def _run(self, batch: int, weights: Mapping[str, Tensor] | None) -> Tensor:
        block = self.block
        if weights is None:
            return block.run(batch, block.hidden[batch])
        replaced = {}
        for name, weight in weights.items():
            module = block.skeleton.model.get_submodule(name)
            own = weight.T if is_transposed(module) else weight
            replaced[f"{name.removeprefix(f'{block.name}.')}.weight"] = own.to(block.skeleton.dtype)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block.module, replaced, args, kwargs)

        return block.calls[batch].run(call, block.hidden[batch])

    @torch.no_grad()
    def measured(self, weights: Mapping[str, Tensor] | None = None) -> float:
        """The loss of a held-out window. NaN if there is none."""
        batches = [batch for batch, held in enumerate(self.held_out) if bool(held.any())]
        count = sum(int(self.held_out[batch].sum()) for batch in batches)
        total = sum(float(self.loss(batch, self.held_out[batch], weights)) for batch in batches)
        return total / count if count else float("nan")


def tune(problem: Problem, weights: Mapping[str, QTensor], originals: Mapping[str, Tensor], how: BlockTuning) -> Tuned:
    """Train the weights of a block. originals: linear -> the weight [N, K] that each approximates."""
    moving = {
        tuple(names): MovedStack([weights[name] for name in names], [originals[name] for name in names])
        for names in alike(weights)
    }
    together: dict[tuple[str, int, str], MovedWeight] = {}
    for (name, *_), each in moving.items():
        key = (name.rpartition(".")[0], each.weight.shape[1], str(each.weight.codec))
        each.share(together.setdefault(key, each))
    trained = {id(each): each for weight in moving.values() for each in weight.parameters_of}
    if (why := problem.why_not()) or not trained:
        return _not(why or "its schemes store nothing that can be trained")
    if not 0 < (before := problem.measured()) < float("inf"):
        return _not(f"its error on the held-out windows is {before:.3g}")
    batches = [batch for batch, held in enumerate(problem.held_out) if not bool(held.all())]
    order = _order(batches, problem, how)

    def values() -> dict[str, Tensor]:
        return {name: own for names, each in moving.items() for name, own in zip(names, each.each(), strict=True)}

    def gradient(step: int) -> None:
        own = values()
        losses = [problem.loss(batch, ~problem.held_out[batch], own) for batch in order[step]]
        count = sum(int((~problem.held_out[batch]).sum()) for batch in order[step])
        (torch.stack(losses).sum() / (count * before)).backward()

    def held_out() -> float:
        with torch.no_grad():
            return problem.measured(values()) / before

    try:
        with torch.enable_grad():
            descend(Objective(list(trained.values()), gradient, held_out), how.wanted, _quietly)
    except torch.OutOfMemoryError:
        raise
    except (NumericsError, RuntimeError, NotImplementedError) as error:  # code of a model may have no gradient
        return _not(first_line(error))
    new, moved = dict[str, QTensor](), dict[str, float | None]()
    for names, each in moving.items():
        for index, name in enumerate(names):
            own = each.part(index)
            new[name], moved[name] = own.tuned(), own.share_moved
    return Tuned(new, moved, [])


def _not(why: str) -> Tuned:
    return Tuned(None, {}, [f"the block was not tuned: {why}"])


def _order(batches: Sequence[int], problem: Problem, how: BlockTuning) -> list[list[int]]:
    """The batches of each step. All are used once before one is used again."""
    windows, length = (problem.targets[batches[0]].shape[at] for at in (0, 1))
    count = min(len(batches), max(1, round(how.wanted.batch / (windows * length))))
    generator, left, steps = torch.Generator().manual_seed(how.seed), list[int](), list[list[int]]()
    shuffled = partial(torch.randperm, len(batches), generator=generator, dtype=torch.int64, device="cpu")
    for _ in range(how.wanted.steps):
        if len(left) < count:
            left += [batches[number] for number in shuffled().tolist()]
        steps.append(left[:count])
        left = left[count:]
    return steps


def _quietly(done: int, total: int, loss: float) -> None:
    """Blocks are counted, and the steps within one are not."""
