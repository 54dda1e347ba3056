"""FP8 codes and their loss by the native library: bit for bit what the scheme's own definition gives."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from fewbit.errors import NumericsError
from fewbit.methods.rtn import RoundToNearest
from fewbit.schemes.base import QTensor, Scheme
from fewbit.schemes.fp8 import FP8
from fewbit.system import native
from tests.contract.cases import ordinary

KINDS = pytest.mark.parametrize("spec", ["fp8-row", "fp8-b128", "fp8-tensor"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 128), (129, 127), (200, 300), (130, 1024)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def scheme_of(spec: str) -> FP8:
    scheme = FP8.from_spec(spec)
    assert scheme is not None
    return scheme


def without_library(scheme: FP8, w: Tensor) -> tuple[dict[str, Tensor], tuple[float, float, int]]:
    """Parts and loss by PyTorch's own operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: "not used")
        parts = scheme.pack(*scheme.nearest(w))
        return parts, scheme.lost(w, parts)


def awkward(n: int, k: int) -> Tensor:
    """Ties, zeros of both signs, subnormal codes, a row of zeros, and rows at both ends of float32's range."""
    w = ordinary(n, k)
    flat = w.reshape(-1)
    flat[::7] = 0.0
    flat[3::11] *= -(2.0**-13)
    flat[5::13] = torch.tensor(17.0) / 448
    if n > 3:
        w[1], w[2] = 0.0, w[2] * 2.0**-140
        w[3] *= 2.0**100
    return w


@KINDS
@SHAPES
@DTYPES
def test_codes_and_loss_are_those_of_the_definition(
    instructions: str,
    spec: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    scheme, w = scheme_of(spec), awkward(*shape).to(dtype)
    expected, lost = without_library(scheme, w)
    parts = scheme.pack(*scheme.nearest(w))
    assert torch.equal(parts["codes"], expected["codes"])
    assert torch.equal(parts["scale"], expected["scale"])
    error, whole, gone = scheme.lost(w, parts)
    assert error == pytest.approx(lost[0], rel=1e-5)
    assert whole == pytest.approx(lost[1], rel=1e-5)
    assert gone == lost[2]


def test_the_library_is_used(library: ctypes.CDLL) -> None:
    w = ordinary(8, 64)
    found = native.fp8_codes(w, (1, 64))
    assert found is not None
    assert native.fp8_lost(w, found[0], torch.ones(8, 1), (1, 64)) is not None
    for other in (w.double(), w.half(), w.T, w.to("meta"), w[:0]):
        assert native.fp8_codes(other, (1, 64)) is None
    for scale in (torch.ones(7, 1), torch.ones(8, 1).double(), torch.ones(8, 2)[:, :1]):  # it would read beyond them
        assert native.fp8_lost(w, found[0], scale, (1, 64)) is None


def test_every_code_loses_what_its_value_is_off(library: ctypes.CDLL) -> None:
    codes = torch.tensor([[code for code in range(256) if code & 0x7F != 0x7F]], dtype=torch.uint8)
    w, scale = torch.zeros(codes.shape), torch.tensor([[0.25]])
    found = native.fp8_lost(w, codes, scale, (1, codes.shape[1]))
    assert found is not None
    values = codes.view(torch.float8_e4m3fn).double() / 4
    assert float(found[0]) == pytest.approx(float(values.square().sum()), rel=1e-6)


def test_groups_that_became_zero_are_counted(library: ctypes.CDLL) -> None:
    w = torch.zeros(4, 256)
    w[0, 0], w[1, 5], w[1, 200] = 1.0, 1e-6, 1e-6  # row 1 shares a scale with row 0 in the first block only
    scheme = scheme_of("fp8-b128")
    parts = scheme.pack(*scheme.nearest(w))
    assert scheme.lost(w, parts)[2] == without_library(scheme, w)[1][2] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 63, 64, 299])
def test_what_is_not_finite_is_refused(library: ctypes.CDLL, bad: float, at: int) -> None:
    w = ordinary(2, 300)
    w[1, at] = bad
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(NumericsError):
            scheme_of("fp8-row").nearest(w.to(dtype))


@KINDS
def test_a_weight_is_rounded_as_it_is_stored(spec: str) -> None:
    scheme, w = scheme_of(spec), ordinary(40, 200).bfloat16()
    assert scheme.rounds_stored
    assert not Scheme.rounds_stored
    narrow, wide = (quantized_by(scheme, each) for each in (w, w.float()))
    assert all(torch.equal(narrow.parts[name], wide.parts[name]) for name in narrow.parts)
    assert scheme.lost(w, narrow.parts) == scheme.lost(w.float(), wide.parts)


def quantized_by(scheme: FP8, w: Tensor) -> QTensor:
    return RoundToNearest().quantize(w, scheme, None).weight
