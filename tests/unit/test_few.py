"""Block types with two to four levels: bytes, and scales that no other scale beats."""

from __future__ import annotations

import pytest
import torch

from fewbit.schemes.base import parse
from fewbit.schemes.ggml.digits import DIGITS, pack, unpack
from fewbit.schemes.ggml.few import Few
from tests.contract.cases import ordinary

names = pytest.mark.parametrize("name", DIGITS)


@names
def test_every_code_in_every_place(name: str) -> None:
    kind = DIGITS[name]
    codes = torch.stack([torch.arange(kind.columns).add(shift) % (kind.top + 1) for shift in range(7)])
    codes = torch.cat([codes, torch.randint(kind.top + 1, (50, kind.columns))]).to(torch.uint8)
    held = pack(name, codes)
    assert held.shape == (57, kind.nbytes - 2)
    assert torch.equal(unpack(name, held), codes)


@names
def test_the_bytes_of_a_block(name: str) -> None:
    """Columns 0, 1 and 32 have the highest level, the others the lowest."""
    kind = DIGITS[name]
    codes = torch.zeros(1, kind.columns, dtype=torch.uint8)
    codes[0, [0, 1, 32]] = kind.top
    held = pack(name, codes)[0].tolist()
    wanted = {
        "q1_0": {0: 0b11, 4: 0b1},
        "q2_0": {0: 0b1111, 8: 0b11},
        "tq2_0": {0: 0b1010, 1: 0b10},
        # digits 2, 2, 0, 0, 0 and 2, 0, 0, 0, 0 of base 3, times 256 / 243, rounded up
        "tq1_0": {0: -(-(162 + 54) * 256 // 243), 1: -(-162 * 256 // 243)},
    }[name]
    assert {i: byte for i, byte in enumerate(held) if byte} == wanted


@names
def test_no_scale_is_better(name: str) -> None:
    """Against 2000 scales from 0 to 1.5 times the largest magnitude, of both signs; importances in one of two cases."""
    kind = DIGITS[name]
    w = ordinary(24, kind.columns)
    importance = torch.rand(kind.columns, generator=torch.Generator().manual_seed(1)) ** 4
    for h, grids in (
        (torch.ones_like(importance), parse(name).nearest(w)[1]),
        (importance, parse(name).fit(w, importance)),
    ):
        found = ((grids.decode(grids.encode(w)) - w).square() * h).sum(1)
        levels = torch.tensor(kind.levels[: kind.top + 1])
        best = torch.full_like(found, torch.inf)
        for step in torch.linspace(-1.5, 1.5, 2000).tolist():
            values = levels * (w.abs().amax(1, keepdim=True) * step)
            nearest = (w[:, :, None] - values[:, None]).square().amin(2)
            best = torch.minimum(best, (nearest * h).sum(1))
        assert (found <= 1.01 * best).all()


def test_q1_0_has_the_weighted_mean() -> None:
    w, h = ordinary(8, 256), torch.rand(256, generator=torch.Generator().manual_seed(2))
    grids = Few(128, "q1_0").fit(w, h)
    wanted = (w.abs() * h).unflatten(1, (2, -1)).sum(2) / h.view(2, -1).sum(1)
    torch.testing.assert_close(grids.d, wanted, rtol=2e-3, atol=0)


def test_a_code_of_tq2_0_that_is_never_written_means_two() -> None:
    blocks = torch.zeros(1, 66, dtype=torch.uint8)
    blocks[0, 0], blocks[0, 65] = 3, 0x3C  # d = 1
    values = parse("tq2_0").dequantize({"blocks": blocks}, (1, 256), torch.float32)
    assert values[0, :2].tolist() == [2.0, -1.0]
