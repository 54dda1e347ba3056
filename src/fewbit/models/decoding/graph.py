"""Work on fixed memory, faster the second time: recorded as a CUDA graph, and compiled before that on request."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from fewbit.errors import PlanError


class Graph:
    """A function without arguments that reads and writes the same memory whenever it is called.

    On a GPU it is run for the first calls, so that all that is made once is made, then recorded as a CUDA graph, and
    replayed from then on; what it returned in the recording is returned each time. One that cannot be recorded is run,
    after a warning, and so is everything on a CPU.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, *, first: int = 1) -> None:
        self.function, self.left = function, first
        self.possible = device.type == "cuda"
        self.recorded: Any = None
        self.out: Any = None

    def __call__(self) -> Any:
        if self.recorded is None and (not self.possible or self.left > 0 or not self._record()):
            self.left -= 1
            return self.function()
        self.recorded.replay()
        return self.out

    def _record(self) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.out = self.function()
        except RuntimeError as error:  # something in the step waits for the GPU
            self.possible = False
            reason = str(error).strip().splitlines()[0][:200]
            warnings.warn(f"a step of this model cannot be recorded as a CUDA graph: {reason}", stacklevel=2)
            return False
        self.recorded = graph
        return True


def check_compile(device: Any, fuse: int | None) -> None:
    """PlanError unless a step can be compiled: it is the step of a fused model, on a GPU."""
    if fuse is None:
        raise PlanError("`compile` without `fuse`", "Only the step of a fused model is compiled: give both.")
    if str(device).partition(":")[0] not in ("cuda", "auto") or not torch.cuda.is_available():
        raise PlanError("`compile` needs an NVIDIA GPU", "Leave out `compile`, or give `device=cuda`.")


class Compiled:
    """A model's forward, compiled by PyTorch at its first call for the shapes it has there.

    Where operations are fused, values between them are rounded as they are one by one (`emulate_precision_casts`), so
    that texts stay the same. A model that cannot be compiled runs as before, after a warning.
    """

    def __init__(self, forward: Callable[..., Any], cache: Any) -> None:
        self.forward, self.cache = forward, cache
        self.quick: Callable[..., Any] | None = None

    def __call__(self, **kwargs: Any) -> Any:
        if self.quick is None:
            return self._first(**kwargs)
        return self.quick(**kwargs)

    def _first(self, **kwargs: Any) -> Any:
        lengths = [(layer, layer.cumulative_length.clone()) for layer in self.cache.layers]
        options: dict[str, Any] = {"emulate_precision_casts": True}
        try:
            quick: Callable[..., Any] = torch.compile(self.forward, dynamic=False, options=options)
            out = quick(**kwargs)
            self.quick = quick
            return out
        except Exception as error:  # whatever a tracer, a code generator and a foreign compiler meet
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            warnings.warn(f"this model runs without being compiled: {reason}", stacklevel=2)
        for layer, length in lengths:  # as they were before a part of the step had been run
            layer.cumulative_length.copy_(length)
        self.quick = self.forward
        return self.forward(**kwargs)
