"""A decoder block in the CPU library: every option, sizes that are no multiples of a vector's, each instruction set."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from fewbit.errors import KernelError
from tests.block_cases import distance, drawn


def test_random_blocks_give_what_pytorch_gives(instructions: str) -> None:
    far = {seed: off for seed in range(150) if (off := distance(drawn(seed))) > 1e-5}
    # Sums are added in another order, so an activation may be rounded to the next of its 8 bits.
    assert len(far) < 4, far
    assert max(far.values(), default=0) < 2e-2, far


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_blocks_in_16_bits_differ_by_their_rounding(instructions: str, dtype: torch.dtype, rounding: float) -> None:
    off = sorted(distance(drawn(seed, dtype)) for seed in range(150))
    assert off[75] <= rounding  # of y, and of keys and values that attention reads
    assert off[-1] <= 2e-2


def test_threads_do_not_change_a_bit(library: ctypes.CDLL) -> None:
    before = torch.get_num_threads()
    try:
        for seed in range(40):
            torch.set_num_threads(1)
            alone = drawn(seed).found()
            torch.set_num_threads(3)
            assert all(torch.equal(a, b) for a, b in zip(alone, drawn(seed).found(), strict=True)), seed
    finally:
        torch.set_num_threads(before)


def test_wrong_wirings_are_refused(library: ctypes.CDLL) -> None:
    case = next(case for case in map(drawn, range(99)) if len(case.wiring.qkv) == 3 and not case.wiring.mixed)
    for wrong in ({"mixed": True}, {"heads": case.wiring.heads + 1}, {"rotated": case.wiring.head + 2}):
        with pytest.raises(KernelError, match="rejects a block"):
            replace(case, wiring=replace(case.wiring, **wrong)).found()
