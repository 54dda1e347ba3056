"""Record a function on fixed memory as a CUDA graph, and optionally compile it first."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from threading import Lock
from typing import Any

import torch

from fewbit.errors import PlanError

_recording = Lock()
_failed: list[Any] = []  # graphs whose recording failed: PyTorch's allocator refers to them without keeping them


class Graph:
    """A function without arguments that reads and writes the same memory in every call.

    On a GPU, the `first` calls run normally, so that one-time setup is done. The next call records a CUDA graph, and
    later calls replay it. Each replay returns the objects that the recording returned. On a CPU, and (after a warning)
    where recording fails, every call runs normally.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, *, first: int = 1) -> None:
        self.function, self.left = function, first
        self.device, self.possible = device, device.type == "cuda"
        self.recorded: Any = None
        self.out: Any = None

    def __call__(self) -> Any:
        if self.recorded is None and (not self.possible or self.left > 0 or not self._record()):
            self.left -= 1
            return self.function()
        with torch.cuda.device(self.device):  # a replay uses the current stream of the current GPU
            self.recorded.replay()
        return self.out

    def _record(self) -> bool:
        with _recording, torch.cuda.device(self.device), _no_collection():
            stream, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
            try:
                # In this mode, other threads may use the GPU meanwhile.
                with torch.cuda.graph(graph, stream=_stream(self.device), capture_error_mode="thread_local"):
                    self.out = self.function()
            except Exception as error:  # an operation waits for the GPU, or a model's own code refuses to be recorded
                self.possible = False
                _recover(stream, graph)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                warnings.warn(f"a step of this model cannot be recorded as a CUDA graph: {reason}", stacklevel=2)
                return False
            self.recorded = graph
            return True


@cache
def _stream(device: torch.device) -> Any:
    """The stream on which graphs of a device are recorded. PyTorch's own default stream for this is on one device."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Inside this context, Python's collector does not run. An old graph that it frees would end the recording:
    "operation not permitted when stream is capturing"."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _recover(stream: Any, graph: Any) -> None:
    """Undo what PyTorch leaves after a recording that failed: `torch.cuda.graph` does not reach its own clean-up.

    The stream of the recording stays the current one. The random generator counts as recording, and fails in the next
    operation that draws numbers ("Offset increment outside graph capture"). The next recording that succeeds ends that.
    """
    torch.cuda.set_stream(stream)
    _failed.append(graph)
    healing = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_stream(stream.device), capture_error_mode="thread_local")
    with suppress(RuntimeError), healing:
        torch.zeros(1, dtype=torch.float32, device=stream.device)


def check_compile(device: Any, fuse: int | None) -> None:
    """PlanError unless a step can be compiled: this needs a fused model on an NVIDIA GPU."""
    if fuse is None:
        raise PlanError("`compile` without `fuse`", "Only the step of a fused model is compiled: give both.")
    if str(device).partition(":")[0] not in ("cuda", "auto") or not torch.cuda.is_available():
        raise PlanError("`compile` needs an NVIDIA GPU", "Leave out `compile`, or give `device=cuda`.")


class Compiled:
    """A model's forward, compiled by PyTorch at the first call, for the shapes of that call.

    Fused operations round intermediate values as separate operations do (`emulate_precision_casts`), so that generated
    texts stay the same. A model that cannot be compiled runs uncompiled, after a warning.
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
        except Exception as error:  # tracer, code generator and C compiler can raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            warnings.warn(f"this model runs without being compiled: {reason}", stacklevel=2)
        for layer, length in lengths:  # undo the part of the step that has run
            layer.cumulative_length.copy_(length)
        self.quick = self.forward
        return self.forward(**kwargs)
