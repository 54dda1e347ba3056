"""Resets PyTorch's global settings to their defaults while fewbit computes.

A program may change the default dtype or device, enable autocast or inference mode, or lower the float32 matmul
precision. fewbit's results must not depend on these: otherwise two programs would get different codes for one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fewbit.lazy import torch

_DEVICES = ("cpu", "cuda")


@contextmanager
def defaults() -> Iterator[None]:
    """Use PyTorch's default settings inside the block, then restore the caller's. Also works as a decorator."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if precision != "highest":
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        yield
