"""AutoRound's own reader of GPTQ files gives the weights that fewbit wrote.

gptqmodel's newest releases cannot be installed beside the torch that development pins, so its layout is tested byte for
byte from its definition (tests/golden). AutoRound carries an independent implementation of the same layout in PyTorch.
"""

from __future__ import annotations

import pytest
import torch

from fewbit.formats.base import Stored
from fewbit.formats.gptq import GPTQFormat
from fewbit.methods.base import Method
from fewbit.schemes.base import parse

reader = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp", reason="make interop installs auto-round")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", ["g32", "g64", "row"])
def test_it_reads_what_was_meant(bits: int, group: str) -> None:
    n, k = 96, 192
    scheme = parse(f"int{bits}-{group}-sym")
    weight = Method().quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(bits)), scheme, None).weight
    config = GPTQFormat().config([Stored("m", (n, k), scheme)], [])
    linear = reader.QuantLinear(bits, config["group_size"], k, n, bias=False, g_idx=True)
    found = linear.load_state_dict(GPTQFormat().lay_out(weight, config), strict=False)
    assert not found.unexpected_keys
    linear.post_init()
    product = linear(torch.eye(k, dtype=torch.float16)).float().T
    # It multiplies in half precision: one rounding of each value.
    torch.testing.assert_close(product, weight.dequantize(torch.float16).float(), rtol=2e-3, atol=1e-6)
