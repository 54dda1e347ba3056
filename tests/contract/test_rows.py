"""The CPU kernel: a row's result does not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from fewbit.kernels.base import Kernel
from fewbit.kernels.cpu.kernel import FEW
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.stacked import concatenated
from tests.contract.cases import EXAMPLES, KERNELS, ordinary, quantized, serves

COUNTS = (1, 2, 3, 5, 8, 17, 64, 300)  # 256 rows are rounded at once
SPECS = [*EXAMPLES, "int3-row", "int4-g32", "int4-g256", "int8-g32"]
SAME = 1e-6  # relative Frobenius norm, for sums of the same products in another order


def shape_of(spec: str) -> tuple[int, int] | None:
    """Rows of more than one piece that the library unpacks, and an odd number of them. None: it does not serve them."""
    found = serves(KERNELS["cpu"], spec, torch.float32, ((33, k) for k in (1056, 1024)))
    return next((shape for shape in found if parse(spec).why_not(shape) is None), None)


SERVED = {spec: shape for spec in SPECS if (shape := shape_of(spec))}


def alike(y: torch.Tensor, whole: torch.Tensor, most: int, m: int) -> bool:
    """Bitwise equal up to `most` rows, else up to the order of float32 sums."""
    if m <= most and len(whole) <= most:
        return torch.equal(y, whole[:m])
    return bool((y - whole[:m]).norm() <= SAME * whole[:m].norm())


def most_rows(kernel: Kernel, spec: str) -> int:
    """Rows up to which results are the same bit for bit: all, unless activations are not rounded."""
    x = torch.linspace(-1, 1, 96)[None] ** 3
    return FEW if torch.equal(kernel.rounded(x, parse(spec)), x) else max(COUNTS)


@pytest.mark.parametrize("spec", SERVED)
def test_a_row_does_not_depend_on_the_rows_beside_it(spec: str) -> None:
    kernel, scheme, shape = KERNELS["cpu"], parse(spec), SERVED[spec]
    prepared = kernel.prepare(scheme, quantized(scheme, ordinary(*shape) + 0.02), shape)
    x = torch.randn(max(COUNTS), shape[1], generator=torch.Generator().manual_seed(0)) + 0.1
    most = most_rows(kernel, spec)
    for total in COUNTS:
        whole = kernel.linear(x[:total], scheme, prepared, shape)
        assert torch.equal(kernel.rounded(x[:total], scheme), kernel.rounded(x, scheme)[:total])
        for m in (count for count in COUNTS if count < total):
            assert alike(kernel.linear(x[:m], scheme, prepared, shape), whole, most, m), (m, total)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(total))
        moved = kernel.linear(x[order], scheme, prepared, shape)
        assert alike(moved[order.argsort()], whole, most, total), total


@pytest.mark.parametrize("spec", [spec for spec in SERVED if spec in ("int4-g32", "q4_k", "nf4-b64")])
def test_a_row_of_an_expert_is_that_of_its_weight_alone(spec: str) -> None:
    kernel, scheme, shape = KERNELS["cpu"], parse(spec), SERVED[spec]
    counts = (1, 0, 7, 40, 90)
    weights = [quantized(scheme, ordinary(*shape, seed=i) + 0.02) for i in range(len(counts))]
    whole = concatenated([QTensor(scheme, shape, parts) for parts in weights])
    x = torch.randn(sum(counts), shape[1], generator=torch.Generator().manual_seed(0)) + 0.1
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    prepared = kernel.prepare(scheme, whole.parts, whole.shape)
    y = kernel.grouped(x, scheme, prepared, (len(counts), *shape), ends)
    most, own = most_rows(kernel, spec), [kernel.prepare(scheme, parts, shape) for parts in weights]
    for expert, (count, end) in enumerate(zip(counts, ends.tolist(), strict=True)):
        for row in range(end - count, end):
            alone = kernel.linear(x[row : row + 1], scheme, own[expert], shape)
            got = y[row : row + 1]
            assert torch.equal(alone, got) if count <= most else (alone - got).norm() <= SAME * alone.norm()
