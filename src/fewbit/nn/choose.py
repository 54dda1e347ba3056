"""Chooses a kernel for packed weights, and checks it once against the reference."""

from __future__ import annotations

import os
import warnings

import torch

from fewbit import registry
from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel
from fewbit.schemes.base import QTensor
from fewbit.system import ambient

# Largest relative Frobenius distance allowed between the kernel's and the reference's product, by activation dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


told = set[str]()  # what this process has said of kernels that are missing


_verdicts: dict[tuple[str, str, tuple[int, int], torch.device, torch.dtype], str | None] = {}


def choose(weight: QTensor, device: torch.device, dtype: torch.dtype, name: str | None = None) -> Kernel:
    """The kernel with the highest priority that supports `weight` on `device` and agrees with the reference on it.

    With `name`, only that kernel is tried. KernelError if no kernel qualifies; it gives the reason for each candidate.
    If the environment has FEWBIT_ACTIVATIONS=exact, kernels that round activations are used only if named.
    """
    kernels: dict[str, Kernel] = {key: kernel() for key, kernel in registry.entries("kernels").items()}
    candidates: list[Kernel] = (
        [registry.get("kernels", name)()] if name else sorted(kernels.values(), key=lambda k: -k.priority)
    )
    exact, reasons = os.environ.get("FEWBIT_ACTIVATIONS") == "exact", []
    missed = None
    for kernel in candidates:
        reason, misfit = kernel.unavailable(), kernel.why_not(weight.codec, weight.shape, device, dtype)
        if reason and not misfit and not (exact and kernel.activations != "exact"):
            missed = missed or kernel.missed()
        reason = reason or misfit
        if reason is None and kernel.priority < 0 and not name:
            reason = "it is used only if requested by name"
        if reason is None and kernel.activations != "exact" and exact and not name:
            reason = "it rounds activations, and FEWBIT_ACTIVATIONS=exact excludes that"
        reason = reason or _disagreement(kernel, kernels["reference"], weight, device, dtype)
        if reason is None:
            if missed:
                tell_once(missed)
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise KernelError(f"no kernel for {weight.codec} of shape {list(weight.shape)}", "; ".join(reasons))


def tell_once(message: str) -> None:
    """A warning, the first time that this process has it."""
    if message not in told:
        told.add(message)
        warnings.warn(message, stacklevel=2)


@ambient.defaults()
def _disagreement(
    kernel: Kernel, reference: Kernel, weight: QTensor, device: torch.device, dtype: torch.dtype
) -> str | None:
    """None if the kernel's product agrees with the reference's on this real weight, else how it differs.

    Checked once per kernel, scheme, shape, device and dtype. Both products use the activations as the kernel rounds
    them: the check is about wrong products, not about rounding.
    """
    if kernel.name == reference.name:
        return None
    key = (kernel.name, str(weight.codec), weight.shape, device, dtype)
    if key not in _verdicts:
        # The input has a mean of 0.5: with a mean of 0, errors in zero points would cancel in the sums.
        rows, gen = max(kernel.checked), torch.Generator().manual_seed(0)
        x = (
            torch.randn(rows, weight.shape[1], generator=gen, dtype=torch.float32, device="cpu")
            .add_(0.5)
            .to(device, dtype)
        )
        read = kernel.rounded(x, weight.codec)
        exact = reference.linear(
            read, weight.codec, reference.prepare(weight.codec, weight.parts, weight.shape), weight.shape
        )
        try:
            prepared = kernel.prepare(weight.codec, weight.parts, weight.shape)
            found = [kernel.linear(x[:m], weight.codec, prepared, weight.shape) for m in kernel.checked]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers, drivers and libraries raise many different types
            _verdicts[key] = f"fails ({type(error).__name__}: {error!s:.200})"
        else:
            expected = [exact[:m].float() for m in kernel.checked]
            distances = [
                float((got.float() - right).norm() / right.norm().clamp(min=1e-30))
                for got, right in zip(found, expected, strict=True)
            ]
            wrong = [distance for distance in distances if not distance <= TOLERANCE[dtype]]
            _verdicts[key] = f"differs from the reference by {wrong[0]:.1e}" if wrong else None
        if _verdicts[key]:
            warnings.warn(f"kernel {kernel.name} {_verdicts[key]} on {weight.codec}: not used", stacklevel=2)
    return _verdicts[key]
