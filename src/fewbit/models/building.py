"""Build one model at a time: transformers changes settings of the whole process while it builds one.

It replaces PyTorch's default dtype and the method that ties weights, and puts them back. If two threads did this at
once, the process could keep the replacements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_lock = RLock()
_empty: ContextVar[bool] = ContextVar("fewbit_empty_parameters", default=False)


@contextmanager
def building() -> Iterator[None]:
    """Inside this context, no other thread is inside it."""
    with _lock:
        yield


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside this context, parameters of modules that this thread makes are on the meta device; buffers have values.

    accelerate's `init_empty_weights` does this for all threads. Then a model that another thread loads loses its
    weights.
    """
    token = _empty.set(True)
    try:
        yield
    finally:
        _empty.reset(token)


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or not _empty.get():
        return None
    empty = type(parameter)(parameter.to("meta"), parameter.requires_grad)
    vars(empty).update(vars(parameter))
    return empty


register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]  # its type stub says that hooks return None
