"""Factors of products are split into two numbers of bfloat16, which hold 16 bits together."""

from __future__ import annotations

import pytest
import torch

from fewbit.products import _halves, add_halves, add_product, in_tf32


def test_halves_hold_sixteen_bits() -> None:
    x = torch.cat([torch.randn(5000), torch.randn(500) * 1e-20, torch.randn(500) * 1e20, torch.zeros(3)])
    high, low = _halves(x)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-17 * x.double().abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_is_added_in_place(dtype: torch.dtype) -> None:
    a, b, whole = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype), torch.ones(5, 9).to(dtype)
    assert add_product(whole[:, 2:5], a, b, beta=0.5, alpha=-2).data_ptr() == whole[:, 2:].data_ptr()
    torch.testing.assert_close(whole[:, 2:5], 0.5 - 2 * (a @ b))
    assert whole[:, :2].eq(1).all()
    whole[:] = 1
    assert add_halves(whole[:, 2:5], a, b, alpha=-2).data_ptr() == whole[:, 2:].data_ptr()
    torch.testing.assert_close(whole[:, 2:5], 1 - 2 * (a @ b))


@pytest.mark.parametrize(("device", "inside"), [("cuda", "tf32"), ("cpu", "none")])
def test_tf32_ends_with_its_context(device: str, inside: str) -> None:
    matmul = torch.backends.cuda.matmul

    def fail() -> None:
        assert matmul.fp32_precision == inside
        raise ValueError("inside")

    assert matmul.fp32_precision == "none"
    with pytest.raises(ValueError, match="inside"), in_tf32(torch.device(device)):
        fail()
    assert matmul.fp32_precision == "none"
