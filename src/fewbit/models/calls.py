"""A call of a block, and what a block returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import PlanError


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block, except the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        return states_of(block(hidden, *self.args, **self.kwargs))


def states_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple or list that begins with it."""
    states = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(states, Tensor):
        raise PlanError(f"a block of this model returns {type(states).__name__}, not hidden states", NO_CALIBRATION)
    return states


NO_CALIBRATION = "Use a method that needs no calibration, such as rtn."
# The forms in which blocks return hidden states. A stand-in for a block has to return the form that the model expects.
SHELLS: tuple[Callable[[Tensor], Any], ...] = (lambda s: s, lambda s: (s,), lambda s: (s, None), lambda s: [s])


def why_not_one_by_one(config: Any) -> str | None:
    """Why the blocks of a model cannot run one by one; None if its config says nothing against it."""
    if "shared" in (getattr(config.get_text_config(decoder=True), "indexer_types", None) or ()):
        return "has layers that share the selection of an earlier layer (indexer_types), and blocks run one by one"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return re.split(r"\n", str(error).strip() or type(error).__name__)[0][:300]


def shared(call: BlockCall, before: list[BlockCall]) -> BlockCall:
    """The previous call if this one is equal, to save memory: batches usually have equal masks and positions."""
    if before and _same(call.args, before[-1].args) and _same(dict(call.kwargs), dict(before[-1].kwargs)):
        return before[-1]
    return call


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a is b or a == b)
