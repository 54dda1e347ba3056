"""What PyTorch lets a program switch for all its code, set aside while fewbit computes.

A program may change the default dtype or device, switch on autocast or inference mode, or allow float32 products to be
rounded. Numbers that fewbit makes must not depend on that: codes of a weight would differ from one program to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fewbit.lazy import torch

_DEVICES = ("cpu", "cuda")


@contextmanager
def defaults() -> Iterator[None]:
    """PyTorch's own settings within, the caller's again after. It decorates a function too."""
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
