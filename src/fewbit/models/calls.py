"""A call of a block, and what a block returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return re.split(r"\n", str(error).strip() or type(error).__name__)[0][:300]
