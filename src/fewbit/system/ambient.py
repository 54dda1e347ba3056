"""Resets PyTorch's global settings to their defaults while fewbit computes.

A program may change the default dtype or device, enable autocast or inference mode, or lower the float32 matmul
precision. fewbit's results must not depend on these: otherwise two programs would get different codes for one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

from fewbit.lazy import torch

_DEVICES = ("cpu", "cuda")
# PyTorch's settings of the process, which all threads share: the first one inside resets them, the last one out
# restores them.
_lock = Lock()
_inside = [0]
_callers: list[Any] = []  # their values outside


@contextmanager
def defaults() -> Iterator[None]:
    """Use PyTorch's default settings inside the block, then restore the caller's. Also works as a decorator."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        _reset()
        stack.callback(_restore)
        yield


def _reset() -> None:
    with _lock:
        _inside[0] += 1
        if _inside[0] > 1:
            return
        _callers[:] = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        _set(torch.float32, "highest")


def _restore() -> None:
    with _lock:
        _inside[0] -= 1
        if not _inside[0]:
            _set(*_callers)


def _set(dtype: torch.dtype, precision: str) -> None:
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)
