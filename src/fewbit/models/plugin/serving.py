"""Who loads a model in this thread: fewbit's own loader, or a user's `from_pretrained`; with which kernel and tower.

All are context variables, so that loads in other threads are not affected. A quantizer reads them once, when it is
made: transformers may call it from threads of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import AutoQuantizationConfig

from fewbit.models import foreign

_own: ContextVar[bool] = ContextVar("fewbit_own_loader", default=False)
_kernel: ContextVar[str | None] = ContextVar("fewbit_kernel", default=None)
_tower: ContextVar[Path | None] = ContextVar("fewbit_tower", default=None)


@contextmanager
def serving(kernel: str | None = None, tower: Path | None = None) -> Iterator[None]:
    """Inside this context, fewbit loads every format that it knows. With `kernel`, packed weights use that kernel.

    tower: the file with the vision tower of a GGUF model. It applies to this thread, even if another back end for the
    format is installed.
    """
    own, named, beside = _own.set(True), _kernel.set(kernel), _tower.set(tower)
    try:
        yield
    finally:
        _tower.reset(beside)
        _kernel.reset(named)
        _own.reset(own)


def own_loader() -> bool:
    """Whether fewbit's own loader loads the model."""
    return _own.get()


def requested_kernel() -> str | None:
    """The kernel for packed weights; None for the best one for each weight."""
    return _kernel.get()


def requested_tower() -> Path | None:
    """The file with the vision tower of the GGUF model; None without one."""
    return _tower.get()


def dispatched(ours: Callable[..., Any], methods: Container[str]) -> Callable[..., Any]:
    """In place of `AutoHfQuantizer.from_config`. Inside `serving`, `ours` makes the quantizer if the quantization
    method is in `methods`."""

    def from_config(theirs: Any, cls: Any, quantization_config: Any, **kwargs: Any) -> Any:
        if own_loader():
            if isinstance(quantization_config, dict):
                quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
            method = quantization_config.quant_method
            if str(getattr(method, "value", method)) in methods:
                return ours(quantization_config, **kwargs)
        return theirs(cls, quantization_config, **kwargs)

    return from_config


def supports(theirs: Any, config: Any) -> bool:
    """In place of `AutoHfQuantizer.supports_quant_method`: first raise an error for a config fewbit cannot read."""
    found = getattr(config, "to_dict", lambda: config)()
    foreign.check(found)
    supported = bool(theirs(config))
    method = str(found.get("quant_method"))
    # transformers would load the model without its quantized weights.
    if not supported and foreign.by_transformers(method):
        raise foreign.unread(method)
    return supported
