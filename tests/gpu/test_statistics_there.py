"""On an NVIDIA GPU: statistics of activations in 16 bits, and the products of GPTQ, are those of the definition."""

from __future__ import annotations

import pytest
import torch

from fewbit.methods.gptq import inverse_factor
from fewbit.products import add_halves
from fewbit.stats import Need, Stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
K, ROWS = 1000, 4096


def close(found: torch.Tensor, exact: torch.Tensor, part: float) -> bool:
    return bool((found.double() - exact).norm() <= part * exact.norm())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
def test_statistics_are_those_of_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(ROWS, K, device="cuda") @ torch.randn(K, K, device="cuda") / 30).to(dtype)
    original = (x + 0.1 * torch.randn_like(x)).to(dtype)
    weight, held_out = torch.rand(ROWS, device="cuda") + 0.1, torch.arange(ROWS, device="cuda") % 8 == 7
    stats, part = Stats(K, Need.SHIFT, "cuda"), 1e-6 if dtype == torch.float32 else 1e-3
    for rows in torch.arange(ROWS, device="cuda").split([1, 700, ROWS - 701]):
        stats.add(x[rows], weight[rows])
        stats.add_shift(x[rows], original[rows], held_out[rows], weight[rows])
    exact, other, w = x.double(), original.double(), weight.double()
    apart, middle = other - exact, (other + exact) / 2

    def mean(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return a[rows].T @ (w[rows, None] * b[rows]) / w[rows].sum()

    every, shift = torch.ones_like(held_out), stats.shift
    assert shift is not None
    assert close(stats.hessian, mean(exact, exact, every), part)
    factor = x.float() * weight.sqrt()[:, None]  # beside the rounding of this, sums are nearly exact
    factor = (factor if dtype == torch.float32 else factor.bfloat16()).double()
    assert close(stats.hessian, factor.T @ factor / w.sum(), 1e-6 if dtype == torch.float32 else 1e-4)
    assert close(shift.middle, mean(middle, middle, ~held_out), part)
    assert close(shift.fit, mean(apart, middle, ~held_out), 4 * part)
    assert close(shift.held_out, mean(apart, middle, held_out), 4 * part)
    assert close(stats.hessian, stats.hessian.T.double(), 1e-6)
    assert float(torch.linalg.eigvalsh(stats.hessian.double()).amin()) > -1e-6 * float(stats.mean_square.mean())


@pytest.mark.parametrize("shape", [(300, 700, 90), (1, 5000, 3), (70000, 520, 64)], ids=str)
def test_products_of_halves_are_nearly_those_of_float32(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b, out = (
        torch.randn(k, m, device="cuda").T,
        torch.randn(k, 2 * n, device="cuda")[:, n:],
        torch.ones(m, n, device="cuda"),
    )
    exact = 1 - 2 * (a.double() @ b.double())
    got = add_halves(out, a, b, alpha=-2)
    assert got is out
    assert close(out, exact, 2e-5)
    assert not close(out, 1 - 2 * (a.bfloat16().double() @ b.bfloat16().double()), 1e-3)


def test_the_inverse_of_a_factor() -> None:
    x = torch.randn(4096, 1500, device="cuda")
    hessian, order = x.T @ x / 4096, torch.randperm(1500, device="cuda")
    inverse, _ = inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(1500, device="cuda", dtype=torch.float64)
    backwards = order.flip(0)
    exact = torch.linalg.cholesky(damped[backwards[:, None], backwards]).inverse()
    assert close(inverse, exact, 1e-4)
