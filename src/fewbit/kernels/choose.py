"""Choose a kernel for packed weights, and check it once against the reference."""

from __future__ import annotations

import os
import warnings

import torch

from fewbit import registry
from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel
from fewbit.schemes.base import QTensor
from fewbit.system import ambient

# Relative Frobenius distance allowed between a kernel and the reference, by dtype of the activations.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


told = set[str]()  # what this process has said of kernels that are missing


_verdicts: dict[tuple[str, str, tuple[int, int], torch.device, torch.dtype], str | None] = {}


def choose(weight: QTensor, device: torch.device, dtype: torch.dtype, name: str | None = None) -> Kernel:
    """The best kernel that can serve `weight` there and agrees with the reference on it.

    KernelError with every candidate's reason if `name` is given and cannot, or none can. FEWBIT_ACTIVATIONS=exact in
    the environment leaves out those that round activations, unless named.
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
            reason = "it serves only where it is asked for by name"
        if reason is None and kernel.activations != "exact" and exact and not name:
            reason = "it rounds activations, and FEWBIT_ACTIVATIONS asks for exact ones"
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
    """None if the kernel's product on this real weight is the reference's, checked once for each scheme and shape.

    Of the activations as the kernel reads them: one that rounds them is asked for by who wants them rounded.
    """
    if kernel.name == reference.name:
        return None
    key = (kernel.name, str(weight.codec), weight.shape, device, dtype)
    if key not in _verdicts:
        # Not centred: an error in the zero points cancels in sums over a centred input.
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
        except Exception as error:  # a compiler, a driver, a library: what they raise differs
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
