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

_HELD_OUT = 8  # every eighth compared window is held out

Run = Callable[[int, Tensor], Tensor]  # number of a batch, states at the block's input -> at its output
Read = dict[str, tuple[Tensor, int]]  # linear, or module of experts -> what it read, and the version of that tensor


def is_held_out(window: int, total: int) -> bool:
    """Whether the compared window of this number is held out, of `total` compared windows."""
    step = min(_HELD_OUT, total)
    return step > 1 and window % step == step - 1


@dataclass
class Original:
    """The original model's states at a block's input, one tensor for each batch of this rank.

    These are the first batches of `Block.hidden`: a part of the calibration text is enough. windows: for each batch,
    the numbers of its windows among the compared windows of all ranks. total: how many these are. reads: for each
    batch, what the linears of the block read, if memory has room for it. weights_needed: whether the block runs with
    its original weights after some of them are replaced.
    """

    states: list[Tensor]
    windows: Sequence[Sequence[int]]
    total: int
    weights_needed: bool = True
    reads: list[Read] = field(default_factory=list)
    _next: list[Tensor] = field(default_factory=list)
    _weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def advanced(self) -> bool:
        """Whether the states at the block's output are known."""
        return bool(self._next) or not self.states

    @property
    def outputs(self) -> list[Tensor]:
        """The states at the block's output, which are known."""
        assert self.advanced
        return self._next

    def same_as(self, hidden: Sequence[Tensor]) -> bool:
        """Whether both models have the same states at the block's input: it is the first."""
        return all(one is other for one, other in zip(self.states, hidden, strict=False))

    def advance(self, skeleton: Skeleton, run: Run) -> None:
        """Compute the states at the block's output, with `run`, which runs the block."""
        with torch.no_grad(), self.weights(skeleton):
            self._next = [run(batch, states) for batch, states in enumerate(self.states)]

    def keep(self, reads: list[Read], outputs: list[Tensor]) -> None:
        """Keep what the linears read, and the states at the block's output, unless these are known."""
        self.reads, self._next = reads, self._next or outputs

    def next_block(self) -> None:
        """Go to the input of the next block."""
        assert self.advanced
        self.states, self._next, self.reads = self._next, [], []
        self._weights.clear()

    def keep_weights(self, skeleton: Skeleton, names: Iterable[str]) -> None:
        """Keep the weights of these linears, which are replaced next, if they are needed."""
        for name in names if self.weights_needed else ():
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
        held = [is_held_out(window, self.total) for window in windows]
        chosen = torch.tensor(held, dtype=torch.bool, device=rows.device)
        return chosen[torch.div(rows, of // len(windows), rounding_mode="floor")]


class AllFed(Exception):
    """Raised when the last linear of a block has its input, to skip the rest of the block (a tenth of the time)."""


class Comparison:
    """What linears of a block read in the original model, for one batch after another.

    names: the linears, `experts`: the inputs of those that belong to experts. The gate and up of an expert are compared
    on the tokens that the router of the quantized model sends to it. What its down reads is not compared: in the
    original model, the expert does not compute these tokens.
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
        self._read: Read = {}

    def keep_all(self) -> None:
        """Run the block on all batches, and keep what the linears read and the block's output."""
        outputs, reads = list[Tensor](), list[Read]()
        for batch in range(len(self.original.states)):
            output = self.run(batch)
            assert output is not None
            outputs.append(output)
            reads.append(self._read)
        self.original.keep(reads, outputs)

    def run(self, batch: int, last: str | None = None) -> Tensor | None:
        """Run the block with its original weights on the original states of a batch. Returns its output, if computed.

        last: the linear whose input is computed last, to skip the rest of the block.
        """
        self._batch = batch
        if batch < len(self.original.reads):
            self._read = self.original.reads[batch]
            return None
        self.running, self._read = True, {}
        self._last = self.experts[last].path if last is not None and last in self.experts else last
        modules: dict[str, nn.Module] = {each.path: each.module for each in self.experts.values()}
        modules |= {name: self.skeleton.model.get_submodule(name) for name in self.names}
        handles = [
            module.register_forward_pre_hook(partial(self._keep, name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            with suppress(AllFed), self.original.weights(self.skeleton):
                return self._run(batch, self.original.states[batch])
        finally:
            self.running = False
            for handle in handles:
                handle.remove()
        return None

    def _keep(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self._read[name] = x, x._version
        if name == self._last:
            raise AllFed

    def _rows(self, name: str) -> Tensor | None:
        """What a linear or module read; None if that is not known, or was overwritten since."""
        x, version = self._read.get(name, (None, 0))
        return x if x is not None and x._version == version else None

    def of(self, name: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rows of the original model for the rows x [..., K] that a linear reads, and which of them are held out.

        None if the rows do not correspond.
        """
        count = x.numel() // x.shape[-1]
        original = self._rows(name)
        if original is None or original.shape != x.shape:
            return None
        rows = torch.arange(count, device=x.device, dtype=torch.int64)
        held_out = self.original.held_out(self._batch, rows, count)
        return None if held_out is None else (original, held_out)

    def of_expert(self, name: str, tokens: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        """The same for a linear of an expert that reads `tokens` int64 [n], of the `count` tokens of its layer."""
        each = self.experts[name]
        original = None if each.is_inner else self._rows(each.path)
        if original is None or original.dim() != 2 or len(original) != count:
            return None
        held_out = self.original.held_out(self._batch, tokens, count)
        return None if held_out is None else (original[tokens], held_out)
