"""Chooses a kernel for packed weights, and checks it once against the reference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fewbit import registry
from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel, cut
from fewbit.schemes.base import Codec, QTensor
from fewbit.schemes.stacked import concatenated
from fewbit.system import ambient

# Largest relative Frobenius distance allowed between the kernel's and the reference's product, by activation dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


told = set[str]()  # warnings that this process has already given


_verdicts: dict[tuple[str, str, tuple[int, int], torch.device, torch.dtype, bool], str | None] = {}
_SOME = 4  # experts with which `grouped` is checked


def choose(
    weight: QTensor, device: torch.device, dtype: torch.dtype, name: str | None = None, experts: int = 0
) -> Kernel:
    """The kernel with the highest priority that supports `weight` on `device` and agrees with the reference on it.

    With `name`, only that kernel is tried. KernelError if no kernel qualifies; it gives the reason for each candidate.
    If the environment has FEWBIT_ACTIVATIONS=exact, kernels that round activations are used only if named.
    experts: if not 0, `weight` stacks the weights of that many experts, and the kernel must support `grouped`.
    """
    some = [_of_expert(weight, experts, e) for e in range(min(experts, _SOME))]
    whole, weight = weight, some[0] if some else weight
    candidates = [registry.get("kernels", name)()] if name else _by_priority()
    reasons, missed = list[str](), None
    for kernel in candidates:
        unavailable, misfit = kernel.unavailable(), kernel.why_not(weight.codec, weight.shape, device, dtype)
        if not name:
            misfit = misfit or _opt_in(kernel, _exact())
        if unavailable and not misfit:
            missed = missed or kernel.missed()
        if some:
            misfit = misfit or kernel.why_not_grouped(whole.codec, (experts, *weight.shape))
        reason = unavailable or misfit or _disagreement(kernel, weight, device, dtype)
        if some:
            reason = reason or _grouped_disagreement(kernel, some, device, dtype)
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


def why_not(kernel: Kernel, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str:
    """Why `choose` does not take this kernel for such a weight; empty if only the check against the reference may."""
    misfit = kernel.unavailable() or kernel.why_not(codec, shape, device, dtype)
    return misfit or _opt_in(kernel, _exact()) or ""


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

    def found() -> list[Tensor]:
        x, codec, shape = _activations(max(kernel.checked), weight, device, dtype), weight.codec, weight.shape
        prepared = kernel.prepare(codec, weight.parts, shape)
        return [kernel.linear(x[:m], codec, prepared, shape) for m in kernel.checked]

    def expected() -> list[Tensor]:
        x = _activations(max(kernel.checked), weight, device, dtype)
        exact = _reference(kernel.rounded(x, weight.codec), weight)
        return [exact[:m] for m in kernel.checked]

    return _verdict(kernel, weight, (device, dtype, False), found, expected)


@ambient.defaults()
def _grouped_disagreement(
    kernel: Kernel, weights: list[QTensor], device: torch.device, dtype: torch.dtype
) -> str | None:
    """The same for `grouped` with the weights of a few experts. One of them gets no rows, one gets a single row."""
    first = weights[0]
    counts = [([rows, 0, 1, rows + 3] * len(weights))[: len(weights)] for rows in kernel.checked]

    def found() -> list[Tensor]:
        whole, shape, products = concatenated(weights), (len(weights), *first.shape), []
        prepared = kernel.prepare(whole.codec, whole.parts, whole.shape)
        for each in counts:
            ends = torch.tensor(each, dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32).to(device)
            x = _activations(sum(each), first, device, dtype)
            products.append(kernel.grouped(x, whole.codec, prepared, shape, ends))
        return products

    def expected() -> list[Tensor]:
        products = []
        for each in counts:
            xs = _activations(sum(each), first, device, dtype).split(each)
            own = [_reference(kernel.rounded(x, first.codec), w) for x, w in zip(xs, weights, strict=True) if len(x)]
            products.append(torch.cat(own))
        return products

    return _verdict(kernel, first, (device, dtype, True), found, expected)


def _verdict(
    kernel: Kernel,
    weight: QTensor,
    where: tuple[torch.device, torch.dtype, bool],
    found: Callable[[], list[Tensor]],
    expected: Callable[[], list[Tensor]],
) -> str | None:
    if kernel.name == "reference":
        return None
    key = (kernel.name, str(weight.codec), weight.shape, *where)
    if key not in _verdicts:
        exact = expected()
        try:
            products = found()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers, drivers and libraries raise many different types
            _verdicts[key] = f"fails ({type(error).__name__}: {error!s:.200})"
        else:
            distances = [
                float((got.float() - right.float()).norm() / right.float().norm().clamp(min=1e-30))
                for got, right in zip(products, exact, strict=True)
            ]
            wrong = [distance for distance in distances if not distance <= TOLERANCE[where[1]]]
            _verdicts[key] = f"differs from the reference by {wrong[0]:.1e}" if wrong else None
        if _verdicts[key]:
            warnings.warn(f"kernel {kernel.name} {_verdicts[key]} on {weight.codec}: not used", stacklevel=2)
    return _verdicts[key]


def _activations(rows: int, weight: QTensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random rows with a mean of 0.5: with a mean of 0, errors in zero points would cancel in the sums."""
    made = torch.randn(
        rows, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    return made.add_(0.5).to(device, dtype)


def _reference(x: Tensor, weight: QTensor) -> Tensor:
    reference: Kernel = registry.get("kernels", "reference")()
    prepared = reference.prepare(weight.codec, weight.parts, weight.shape)
    return reference.linear(x, weight.codec, prepared, weight.shape)


def _of_expert(weight: QTensor, experts: int, expert: int) -> QTensor:
    """The weight of one expert, without its permutation."""
    rows = weight.shape[0] // experts
    parts = {name: cut(part, experts, expert) for name, part in weight.parts.items()}
    return QTensor(weight.codec, (rows, weight.shape[1]), parts)
