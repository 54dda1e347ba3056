"""The original model's hidden states, kept beside those of the quantized model.

A linear of a quantized model reads x̃, and the same linear of the original model reads x. `Need.SHIFT` compares the two
(`stats.py`). So each block also runs with its original weights on the original model's states. In the first block both
streams are the same.

Every eighth calibration window is held out of the fit of the shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models.experts import ExpertInput
from fewbit.models.skeleton import Skeleton

_HELD_OUT = 8  # one window in so many

Run = Callable[[int, Tensor], Tensor]  # number of a batch, states at the block's input -> at its output


@dataclass
class Original:
    """The original model's states at a block's input, one tensor for each batch of this rank.

    windows: for each batch, the numbers of its calibration windows, over all ranks. total: the number of all windows.
    """

    states: list[Tensor]
    windows: Sequence[range]
    total: int
    _next: list[Tensor | None] = field(default_factory=list)
    _weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def advanced(self) -> bool:
        """Whether the states at the block's output are known."""
        return all(states is not None for states in self._next) and len(self._next) == len(self.states)

    @property
    def replaced(self) -> bool:
        """Whether linears of the block have quantized weights already."""
        return bool(self._weights)

    def same_as(self, hidden: Sequence[Tensor]) -> bool:
        """Whether the block computes the same for both models: it is the first, and its weights are the original's."""
        return not self._weights and all(one is other for one, other in zip(self.states, hidden, strict=True))

    def advance(self, skeleton: Skeleton, run: Run) -> None:
        """Compute the states at the block's output, with `run`, which runs the block."""
        with torch.no_grad(), self.weights(skeleton):
            self._next = [run(batch, states) for batch, states in enumerate(self.states)]

    def put(self, batch: int, output: Tensor) -> None:
        """Store the states of a batch at the block's output. Those at its input are no longer needed."""
        self._next += [None] * (batch + 1 - len(self._next))
        self.states[batch] = self._next[batch] = output

    def next_block(self) -> None:
        """Go to the input of the next block."""
        assert self.advanced
        self.states = [states for states in self._next if states is not None]
        self._next.clear()
        self._weights.clear()

    def keep_weights(self, skeleton: Skeleton, names: Iterable[str]) -> None:
        """Keep the weights of these linears, which are replaced next, for later runs of the block."""
        for name in names:
            weight = skeleton.model.get_submodule(name).get_parameter("weight")
            self._weights[name], weight.data = weight.data, weight.data.clone()

    @contextmanager
    def weights(self, skeleton: Skeleton) -> Iterator[None]:
        """A context in which the linears whose weights were kept have them again."""
        parameters = {name: skeleton.model.get_submodule(name).get_parameter("weight") for name in self._weights}
        quantized = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self._weights[name]
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = quantized[name]

    def held_out(self, batch: int, rows: Tensor, of: int) -> Tensor | None:
        """bool [n]: whether each of the batch's `rows` int64 [n], numbers below `of`, is of a held-out window.

        The rows of a window lie one after the other. None if it is not known which window a row is of.
        """
        windows = self.windows[batch]
        if of % len(windows):
            return None
        step = min(_HELD_OUT, self.total)
        chosen = torch.tensor([step > 1 and window % step == step - 1 for window in windows], device=rows.device)
        return chosen[torch.div(rows, of // len(windows), rounding_mode="floor")]


class AllFed(Exception):
    """Raised when the last linear of a block has its input, to skip the rest of the block (a tenth of the time)."""


class Comparison:
    """What linears of a block read in the original model, for one batch after another.

    names: the linears, `experts`: the inputs of those that belong to experts. An expert is compared on the tokens that
    the router of the quantized model sends to it: the rows of the original model are what it would read for them.
    """

    def __init__(
        self,
        original: Original,
        skeleton: Skeleton,
        run: Run,
        names: Iterable[str],
        experts: Mapping[str, ExpertInput],
    ) -> None:
        self.original, self.skeleton, self._run, self.experts = original, skeleton, run, experts
        self.names = [name for name in names if name not in experts]
        self.running = False  # whether the block runs as the original model now
        self._batch = 0
        self._last: str | None = None
        self._read: dict[str, Tensor] = {}  # linear, or module of experts -> what it read

    def run(self, batch: int, *, last: str | None = None, final: bool = False) -> None:
        """Run the block with its original weights on the original states of a batch.

        last: the linear whose input is computed last, to skip the rest of the block. final: run all of it, and store
        the output if it is not known.
        """
        self._batch, self.running = batch, True
        self._read.clear()
        self._last = None if final or last is None else self.experts[last].path if last in self.experts else last
        modules: dict[str, nn.Module] = {each.path: each.module for each in self.experts.values()}
        modules |= {name: self.skeleton.model.get_submodule(name) for name in self.names}
        handles = [
            module.register_forward_pre_hook(partial(self._keep, name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            with suppress(AllFed), self.original.weights(self.skeleton):
                output = self._run(batch, self.original.states[batch])
                if final and not self.original.advanced:
                    self.original.put(batch, output)
        finally:
            self.running = False
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._read[name] = args[0] if args else next(iter(kwargs.values()))
        if name == self._last:
            raise AllFed

    def of(self, name: str, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows of the original model for the rows x [..., K] that a linear reads, and which of them are held out.

        None for both if the rows do not correspond.
        """
        original = self._read.get(name)
        if original is None or original.shape != x.shape:
            return None, None
        count = x.numel() // x.shape[-1]
        rows = torch.arange(count, device=x.device, dtype=torch.int64)
        held_out = self.original.held_out(self._batch, rows, count)
        return (None, None) if held_out is None else (original, held_out)

    def of_expert(self, name: str, tokens: Tensor, count: int) -> tuple[Tensor | None, Tensor | None]:
        """The same for a linear of an expert that reads `tokens` int64 [n], of the `count` tokens of its layer."""
        each = self.experts[name]
        original = self._read.get(each.path)
        if original is None or original.dim() != 2 or len(original) != count:
            return None, None
        held_out = self.original.held_out(self._batch, tokens, count)
        if held_out is None or (each.is_inner and self.original.replaced):
            return None, None
        rows = original[tokens]
        if each.is_inner:
            self.running = True
            rows = each.module.inner(each.expert, rows)
            self.running = False
        return rows, held_out
