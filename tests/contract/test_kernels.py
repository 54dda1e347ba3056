"""What every kernel keeps: the reference's product within the stated tolerance, and the parts byte for byte."""

from __future__ import annotations

import pytest
import torch

from fewbit.kernels.base import Kernel
from fewbit.nn.choose import TOLERANCE
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.stacked import concatenated
from tests.contract.cases import (
    CPU,
    EXAMPLES,
    KERNELS,
    SPECS,
    hard,
    is_sentence,
    ordinary,
    quantized,
    same_bytes,
    served,
    serves,
)

ROWS = (1, 2, 15, 16, 17, 64, 300)
MORE = ("int3-row", "int4-g32", "int4-g32-sym", "int4-g256", "int4-row-sym", "int8-g32")
ALL_SPECS = list(dict.fromkeys([*EXAMPLES, *MORE]))
kernels = pytest.mark.parametrize("name", KERNELS)


def shapes(spec: str) -> list[tuple[int, int]]:
    """From tiny to ragged, all that the scheme can store."""
    group = parse(spec).group
    widths = (group, 3 * group) if group else (32, 37, 128, 160)
    return [(n, k) for n in (1, 16, 33, 48) for k in widths if parse(spec).why_not((n, k)) is None]


def one_group(spec: str) -> list[tuple[int, int]]:
    return [(48, parse(spec).group or 96)]


def two_groups(spec: str) -> list[tuple[int, int]]:
    return [(48, 2 * (parse(spec).group or 64))]


def check_product(kernel: Kernel, spec: str, dtype: torch.dtype) -> None:
    """x Wᵀ is the exact float32 product of x as the kernel rounds it, for every shape that it does not refuse."""
    scheme = parse(spec)
    for n, k in serves(kernel, spec, dtype, shapes(spec)):
        # An offset, so that a mistake in the zero point does not average out.
        parts = quantized(scheme, ordinary(n, k) + 0.02)
        w = scheme.dequantize(parts, (n, k), torch.float32)
        prepared = kernel.prepare(scheme, parts, (n, k))
        for m in ROWS:
            x = (torch.randn(m, k, generator=torch.Generator().manual_seed(m)) + 0.1).to(dtype)
            y = kernel.linear(x, scheme, prepared, (n, k))
            assert y.dtype == dtype
            assert y.shape == (m, n)
            read = kernel.rounded(x, scheme).float()
            assert torch.equal(read, x.float()) or kernel.activations != "exact"
            exact = read @ w.T
            assert (y.float() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def check_restored(kernel: Kernel, spec: str, dtype: torch.dtype) -> None:
    """What was prepared gives the canonical parts back, byte for byte; the first tensor holds the codes."""
    scheme = parse(spec)
    for n, k in serves(kernel, spec, dtype, shapes(spec)):
        parts = quantized(scheme, hard(n, k))
        before = {key: part.clone() for key, part in parts.items()}
        prepared = kernel.prepare(scheme, parts, (n, k))
        assert not prepared[0].dtype.is_floating_point
        assert same_bytes(kernel.restore(scheme, prepared, (n, k)), before)


@served(shapes, specs=ALL_SPECS)
def test_product(name: str, spec: str, dtype: torch.dtype) -> None:
    check_product(KERNELS[name], spec, dtype)


# How many rows each expert has, and how many rows after them have none.
ROUTED = (
    ((1,), 0),
    ((5,), 2),
    ((0, 1, 20, 3), 0),
    ((0, 0, 12, 0), 1),
    ((1, 1, 1, 1), 0),
    ((9, 8, 7, 0), 3),
    ((0, 0), 2),
)


def check_grouped(kernel: Kernel, spec: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> None:
    """Each row is the exact float32 product with the weight of its expert, and rows without an expert are 0."""
    (n, k), scheme = shape, parse(spec)
    for counts, more in ROUTED:
        m, e = sum(counts) + more, len(counts)
        weights = [quantized(scheme, ordinary(n, k, seed=i) + 0.02) for i in range(e)]
        whole = concatenated([QTensor(scheme, (n, k), parts) for parts in weights]).map(lambda part: part.to(device))
        prepared = kernel.prepare(scheme, whole.parts, whole.shape)
        x = (torch.randn(m, k, generator=torch.Generator().manual_seed(m)) + 0.1).to(device, dtype)
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)
        y = kernel.grouped(x, scheme, prepared, (e, n, k), ends)
        assert y.dtype == dtype
        assert y.shape == (m, n)
        assert not y[m - more :].any()
        start = 0
        for expert, count in enumerate(counts):
            own = x[start : start + count]
            w = scheme.dequantize(weights[expert], (n, k), torch.float32).to(device)
            exact = kernel.rounded(own, scheme).float() @ w.T if count else own.float() @ w.T
            assert (y[start : start + count].float() - exact).norm() <= TOLERANCE[dtype] * exact.norm(), (
                counts,
                expert,
            )
            start += count
        last = kernel.of_expert(scheme, prepared, (e, n, k), e - 1)
        parts = {name: part.cpu() for name, part in kernel.restore(scheme, last, (n, k)).items()}
        assert same_bytes(parts, weights[-1])


@served(lambda spec: [(48, shapes(spec)[-1][1])], specs=ALL_SPECS)
def test_each_row_meets_the_weight_of_its_expert(name: str, spec: str, dtype: torch.dtype) -> None:
    kernel, shape = KERNELS[name], (48, shapes(spec)[-1][1])
    if why := kernel.why_not_grouped(parse(spec), (4, *shape)):
        assert is_sentence(why)
    else:
        check_grouped(kernel, spec, dtype, shape, CPU)


@served(shapes, specs=ALL_SPECS)
def test_restored(name: str, spec: str, dtype: torch.dtype) -> None:
    check_restored(KERNELS[name], spec, dtype)


@kernels
def test_it_serves_something_or_says_why_not(name: str) -> None:
    kernel = KERNELS[name]
    assert kernel.name == name
    if (reason := kernel.unavailable()) is not None:
        assert is_sentence(reason)
        return
    asked = [(spec, dtype, shape) for spec in ALL_SPECS for dtype in TOLERANCE for shape in shapes(spec)]
    reasons = [kernel.why_not(parse(spec), shape, CPU, dtype) for spec, dtype, shape in asked]
    assert None in reasons
    assert all(is_sentence(reason) for reason in reasons if reason is not None)


@served(one_group, specs=ALL_SPECS, exact=True)
def test_all_codes_are_multiplied(name: str, spec: str, dtype: torch.dtype) -> None:
    """The identity reads the weight itself out of a kernel, column by column."""
    kernel, scheme = KERNELS[name], parse(spec)
    ((n, k),) = one_group(spec)
    parts = quantized(scheme, ordinary(n, k) + 0.02)
    got = kernel.linear(torch.eye(k, dtype=dtype), scheme, kernel.prepare(scheme, parts, (n, k)), (n, k)).float().T
    w = scheme.dequantize(parts, (n, k), torch.float32)
    assert ((got - w).norm(dim=0) <= TOLERANCE[dtype] * w.norm(dim=0)).all()


@served(two_groups, specs=ALL_SPECS, exact=True)
def test_an_outlier_does_not_blur_the_columns_beside_it(name: str, spec: str, dtype: torch.dtype) -> None:
    """A zero point far from the middle, times the scale of an outlier, leaves no rounding error on every weight."""
    kernel, scheme = KERNELS[name], parse(spec)
    ((n, k),) = two_groups(spec)
    w = ordinary(n, k) / 2
    w[:, :: parse(spec).group or k] = -8 * w.abs().max()
    parts = quantized(scheme, w)
    x = (torch.randn(64, k, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    x[:, :: parse(spec).group or k] = 0
    exact = x.float() @ scheme.dequantize(parts, (n, k), torch.float32).T
    y = kernel.linear(x, scheme, kernel.prepare(scheme, parts, (n, k)), (n, k)).float()
    assert (y - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@served(lambda spec: [(48, 96)], specs=["int4-g32", "llm.int8"])
def test_strided_activations_are_read_right(name: str, spec: str, dtype: torch.dtype) -> None:
    kernel, scheme, shape = KERNELS[name], parse(spec), (48, 96)
    prepared = kernel.prepare(scheme, quantized(scheme, ordinary(*shape)), shape)
    x = torch.randn(192, 20, generator=torch.Generator().manual_seed(0)).to(dtype).T[:, ::2]
    strided = kernel.linear(x, scheme, prepared, shape)
    assert torch.equal(strided, kernel.linear(x.contiguous(), scheme, prepared, shape))


def test_the_reference_refuses_nothing() -> None:
    for spec in SPECS:
        for dtype in TOLERANCE:
            assert KERNELS["reference"].why_not(parse(spec), (7, 1024), CPU, dtype) is None
