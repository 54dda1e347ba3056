"""AutoAWQ's own packing writes the bytes that fewbit writes, and its own reader gives the weights that were meant.

The package is dead, and its top module needs a transformers that is long gone; its linear layers import without it.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.formats.awq import AWQFormat
from fewbit.formats.base import Stored
from fewbit.methods.base import Method
from fewbit.schemes.affine import AffineGrids
from fewbit.schemes.base import QTensor, parse

found = importlib.util.find_spec("awq")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(found is None, reason="make interop installs autoawq"),
]
N, K = 96, 256


@pytest.fixture(scope="module")
def awq() -> Iterator[Any]:
    """The modules gemm, gemv and packing_utils, under an empty top module."""
    assert found is not None
    top = types.ModuleType("awq")
    top.__path__ = list(found.submodule_search_locations or [])
    sys.modules["awq"] = top
    names = {"gemm": "modules.linear.gemm", "gemv": "modules.linear.gemv", "packing": "utils.packing_utils"}
    yield types.SimpleNamespace(**{key: importlib.import_module(f"awq.{name}") for key, name in names.items()})
    for name in [name for name in sys.modules if name.partition(".")[0] == "awq"]:
        del sys.modules[name]


def weight(group: int) -> QTensor:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(group)) * 0.05
    return Method().quantize(w, parse(f"int4-g{group}"), None).weight


def theirs(kind: Any, weight: QTensor, group: int) -> Any:
    """The weight as AutoAWQ packs it: it is handed the values, and scales and zeros by group and row."""
    _, grids = weight.codec.unpack(weight.parts, weight.shape)  # type: ignore[attr-defined]
    assert isinstance(grids, AffineGrids)
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = weight.dequantize()
    scales, zeros = grids.scale, grids.zero
    if kind.__name__ == "WQLinear_GEMM":
        scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    return kind.from_linear(linear, 4, group, scales=scales, zeros=zeros)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_gemm_files_are_the_same_byte_for_byte(awq: Any, group: int) -> None:
    ours = weight(group)
    config = AWQFormat().config([Stored("m", (N, K), parse(f"int4-g{group}"))], [])
    mine, peer = AWQFormat().lay_out(ours, config), theirs(awq.gemm.WQLinear_GEMM, ours, group)
    for suffix in ("qweight", "qzeros", "scales"):
        assert torch.equal(mine[suffix], getattr(peer, suffix)), suffix
    values = awq.packing.dequantize_gemm(mine["qweight"], mine["qzeros"], mine["scales"], 4, group).T
    torch.testing.assert_close(values.float(), ours.dequantize(), rtol=1e-3, atol=0)  # it multiplies in fp16


@pytest.mark.parametrize("group", [32, 64, 128])
def test_its_gemv_files_are_read(awq: Any, group: int) -> None:
    ours = weight(group)
    peer = theirs(awq.gemv.WQLinear_GEMV, ours, group)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemv"}
    tensors = {suffix: getattr(peer, suffix) for suffix in ("qweight", "qzeros", "scales")}
    assert torch.equal(AWQFormat().read(tensors, config, "m").dequantize(), ours.dequantize())
