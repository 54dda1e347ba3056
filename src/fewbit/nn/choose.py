"""Chooses a kernel for packed weights, and checks it once against the reference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fewbit import registry
from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel
from fewbit.schemes.base import Codec, QTensor
from fewbit.system import ambient

# Largest relative Frobenius distance allowed between the kernel's and the reference's product, by activation dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


told = set[str]()  # warnings that this process has already given


_verdicts: dict[tuple[str, str, tuple[int, int], torch.device, torch.dtype], str | None] = {}


def choose(weight: QTensor, device: torch.device, dtype: torch.dtype, name: str | None = None) -> Kernel:
    """The kernel with the highest priority that supports `weight` on `device` and agrees with the reference on it.

    With `name`, only that kernel is tried. KernelError if no kernel qualifies; it gives the reason for each candidate.
    If the environment has FEWBIT_ACTIVATIONS=exact, kernels that round activations are used only if named.
    """
    candidates = [registry.get("kernels", name)()] if name else _by_priority()
    reasons, missed = list[str](), None
    for kernel in candidates:
        unavailable, misfit = kernel.unavailable(), kernel.why_not(weight.codec, weight.shape, device, dtype)
        if not name:
            misfit = misfit or _opt_in(kernel, _exact())
        if unavailable and not misfit:
            missed = missed or kernel.missed()
        reason = unavailable or misfit or _disagreement(kernel, weight, device, dtype)
        if reason is None:
            if missed:
                tell_once(missed)
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise KernelError(f"no kernel for {weight.codec} of shape {list(weight.shape)}", "; ".join(reasons))


def expected(
    codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype, *, here: bool = True
) -> str:
    """The name of the kernel that `choose` takes for such a weight, unless the check against the reference fails.

    here: of the kernels that this machine and FEWBIT_ACTIVATIONS allow; otherwise of all that fewbit has.
    """
    for kernel in _by_priority():
        refused = kernel.why_not(codec, shape, device, dtype) or _opt_in(kernel, here and _exact())
        if not refused and not (here and kernel.unavailable()):
            return kernel.name
    return "reference"


def _by_priority() -> list[Kernel]:
    kernels: list[Kernel] = [kernel() for kernel in registry.entries("kernels").values()]
    return sorted(kernels, key=lambda kernel: -kernel.priority)


_exact_here: ContextVar[bool] = ContextVar("fewbit_exact_activations", default=False)


@contextmanager
def exact_activations() -> Iterator[None]:
    """Inside this context, kernels that round activations are used only if named."""
    token = _exact_here.set(True)
    try:
        yield
    finally:
        _exact_here.reset(token)


def _exact() -> bool:
    return _exact_here.get() or os.environ.get("FEWBIT_ACTIVATIONS") == "exact"


def _opt_in(kernel: Kernel, exact: bool) -> str | None:
    """Why the kernel is used only by name; None if it is not. exact: activations must not be rounded."""
    if kernel.priority < 0:
        return "it is used only if requested by name"
    if exact and kernel.activations != "exact":
        return "it rounds activations, which is excluded here (FEWBIT_ACTIVATIONS=exact, or a measurement)"
    return None


def tell_once(message: str) -> None:
    """Give a warning, but only once in this process."""
    if message not in told:
        told.add(message)
        warnings.warn(message, stacklevel=2)


@ambient.defaults()
def _disagreement(kernel: Kernel, weight: QTensor, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernel's product agrees with the reference's on this real weight, else how it differs.

    Checked once per kernel, scheme, shape, device and dtype. Both products use the activations as the kernel rounds
    them: the check is about wrong products, not about rounding.
    """
    reference: Kernel = registry.get("kernels", "reference")()
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
