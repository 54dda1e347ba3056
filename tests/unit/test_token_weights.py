"""A token counts by the norm of its hidden state, within limits."""

from __future__ import annotations

import torch

from fewbit.methods.gptq import GPTQ
from fewbit.methods.rtn import RoundToNearest
from fewbit.pipeline import token_weights
from fewbit.schemes.base import parse
from fewbit.stats import Need, Stats
from tests.contract.cases import inputs


def states(windows: int, tokens: int, k: int) -> torch.Tensor:
    return inputs(windows * tokens, k).view(windows, tokens, k)


def test_ordinary_tokens_count_by_their_norm() -> None:
    x = states(3, 16, 32)
    weights = token_weights.of_tokens(x)
    torch.testing.assert_close(weights, x.norm(dim=-1))
    rows = token_weights.of_rows(x.flatten(0, 1), weights)
    assert rows is not None
    torch.testing.assert_close(rows, weights.flatten())


def test_a_massive_token_counts_within_limits() -> None:
    x = states(3, 16, 32)
    x[1, 0] *= 1000
    weights = token_weights.of_tokens(x)
    median = x[1].norm(dim=-1).median()
    assert weights[1, 0] == 64 * median
    rows = token_weights.of_rows(x, weights)
    assert rows is not None
    counted = rows.view(3, 16)[1, 0] * x[1, 0].square().sum()
    torch.testing.assert_close(counted, 64 * median * (4 * median) ** 2)
    alone = token_weights.of_tokens(x[1:2])  # whatever other windows are in the batch
    assert torch.equal(alone[0], weights[1])


def test_rows_that_are_no_tokens_have_no_weights() -> None:
    x = states(2, 8, 16)
    assert token_weights.of_rows(x[:, :4], token_weights.of_tokens(x)) is None


def test_a_window_of_zeros_has_weights() -> None:
    x = torch.zeros(1, 4, 8)
    x[0, 0] = 5
    weights = token_weights.of_tokens(x)
    rows = token_weights.of_rows(x, weights)
    assert rows is not None
    assert bool((weights > 0).all())
    assert bool((rows > 0).all())


def test_a_massive_token_does_not_spoil_the_others() -> None:
    """MXFP4 cannot hold the weight that multiplies it; the other columns must not pay for that."""
    x = states(4, 256, 64)
    x[:, 0, 3] = 300
    w = inputs(8, 64) / 8
    w[:, 3] = 6.875
    weights = token_weights.of_tokens(x)
    rows = token_weights.of_rows(x, weights)
    stats = Stats(64, Need.HESSIAN)
    stats.add(x.flatten(0, 1), rows)
    scheme, rest = parse("mxfp4"), x[:, 1:].flatten(0, 1)

    def error(q: torch.Tensor) -> float:
        return float((rest @ (q - w).T).norm())

    nearest = error(RoundToNearest().quantize(w, scheme, None).weight.dequantize())
    assert error(GPTQ().quantize(w, scheme, stats).weight.dequantize()) < nearest
    stats = Stats(64, Need.HESSIAN)
    stats.add(x.flatten(0, 1), x.norm(dim=-1).flatten())
    assert error(GPTQ().quantize(w, scheme, stats).weight.dequantize()) > 2 * nearest
