"""Statistics are means over the finite rows, whatever batches these come in, and say how many rows were not."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import NumericsError
from fewbit.stats import Need, Stats
from tests.contract.cases import inputs

EPS = torch.finfo(torch.float32).eps
GATHERED = [Need.MEAN_ABS, Need.MEAN_SQUARE, Need.HESSIAN]


def gathered(need: Need, *batches: torch.Tensor) -> Stats:
    stats = Stats(batches[0].shape[-1], need)
    for batch in batches:
        stats.add(batch)
    return stats


def rounding(x: torch.Tensor) -> torch.Tensor:
    """The most that rounding in float32 can change the mean of x xᵀ over the rows, in whatever order they are added."""
    size = x.double().abs()
    return len(x) * EPS * (size.T @ size) / len(x)


def test_each_is_its_definition_in_float64() -> None:
    x = inputs(500, 24)
    batches = x.split([1, 7, 200, 292])
    exact = x.double()
    squares = rounding(x).diagonal()
    found = {
        "abs": (gathered(Need.MEAN_ABS, *batches).mean_abs, exact.abs().mean(0), 500 * EPS * exact.abs().mean(0)),
        "square": (gathered(Need.MEAN_SQUARE, *batches).mean_square, exact.square().mean(0), squares),
        "hessian": (gathered(Need.HESSIAN, *batches).hessian, exact.T @ exact / 500, rounding(x)),
        "diagonal": (gathered(Need.HESSIAN, *batches).mean_square, exact.square().mean(0), squares),
    }
    for name, (mean, expected, bound) in found.items():
        assert mean.dtype == torch.float32, name
        assert ((mean.double() - expected).abs() <= bound).all(), name


def test_many_small_batches_lose_no_digits() -> None:
    x = inputs(4000, 8)
    stats = gathered(Need.HESSIAN, *x.split(2))
    exact = x.double().T @ x.double() / 4000
    assert ((stats.hessian.double() - exact).abs() <= rounding(x)).all()
    assert stats.rows == 4000


@pytest.mark.parametrize("k", [1, 64, 65, 200, 1000])
def test_a_hessian_of_many_columns_is_read_between_batches(k: int) -> None:
    """Only a part of it is computed, and the rest is a copy."""
    x = inputs(90, k)
    stats, order = Stats(k, Need.HESSIAN), torch.arange(k).flip(0)
    for end in (30, 60, 90):
        stats.add(x[end - 30 : end])
        exact = x[:end].double().T @ x[:end].double() / end
        for found, wanted in ((stats.ordered(order), exact.flip(0, 1)), (stats.divided(torch.ones(k)), exact)):
            torch.testing.assert_close(found.hessian.double(), wanted, rtol=1e-4, atol=1e-5)
        assert ((stats.hessian.double() - exact).abs() <= rounding(x)).all()


def test_a_hessian_is_whole_after_it_shrinks_towards_another() -> None:
    x, y = inputs(90, 200).split([40, 50])
    stats, pool = gathered(Need.HESSIAN, x), gathered(Need.HESSIAN, y)
    _ = stats.hessian
    stats.shrink(pool, 10.0)
    exact = (x.double().T @ x.double() + 10 / 50 * (y.double().T @ y.double())) / 50
    torch.testing.assert_close(stats.hessian.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need", GATHERED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_dropped_and_counted(need: Need, bad: float) -> None:
    x = inputs(20, 8)
    spoiled = x.clone()
    spoiled[3, 5] = bad
    spoiled[11, 0], spoiled[11, 1] = torch.inf, -torch.inf
    kept = [i for i in range(20) if i not in (3, 11)]
    stats, clean = gathered(need, spoiled), gathered(need, x[kept])
    assert (stats.rows, stats.dropped) == (18, 2)
    name = {Need.MEAN_ABS: "mean_abs", Need.MEAN_SQUARE: "mean_square", Need.HESSIAN: "hessian"}[need]
    torch.testing.assert_close(getattr(stats, name), getattr(clean, name))
    stats.add(torch.full((4, 8), bad))
    assert (stats.rows, stats.dropped) == (18, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_shape_and_dtype_of_rows(dtype: torch.dtype) -> None:
    x = inputs(24, 8).to(dtype).requires_grad_()
    stats = gathered(Need.HESSIAN, x.reshape(2, 3, 4, 8))
    assert stats.rows == 24
    assert not stats.hessian.requires_grad
    torch.testing.assert_close(stats.hessian, gathered(Need.HESSIAN, x.float()).hessian)


def test_large_half_precision_rows_do_not_overflow() -> None:
    stats = gathered(Need.HESSIAN, torch.full((3, 8), 60000, dtype=torch.float16))
    torch.testing.assert_close(stats.hessian, torch.full((8, 8), 60000.0**2))


def test_a_hessian_is_symmetric_and_positive() -> None:
    x = inputs(300, 24)
    hessian = gathered(Need.HESSIAN, x).hessian.double()
    # Some processors add up the two halves in different orders.
    assert ((hessian - hessian.T).abs() <= 2 * rounding(x)).all()
    assert torch.linalg.eigvalsh(hessian).min() > 0


@pytest.mark.parametrize("need", GATHERED)
def test_without_a_finite_row_there_is_no_mean(need: Need) -> None:
    stats = gathered(need, torch.full((3, 8), torch.nan), torch.empty(0, 8))
    name = {Need.MEAN_ABS: "mean_abs", Need.MEAN_SQUARE: "mean_square", Need.HESSIAN: "hessian"}[need]
    with pytest.raises(NumericsError, match="no finite row"):
        getattr(stats, name)


def test_what_was_not_gathered_is_not_made_up() -> None:
    with pytest.raises(NumericsError, match="MEAN_ABS"):
        _ = gathered(Need.MEAN_ABS, inputs(4, 8)).hessian
    with pytest.raises(NumericsError, match="NOTHING"):
        _ = gathered(Need.NOTHING, inputs(4, 8)).mean_abs


def test_each_kind_tells_what_those_before_it_do() -> None:
    """As the module says: whoever asks for more can still be asked for less."""
    x = inputs(50, 8)
    for need in GATHERED:
        torch.testing.assert_close(gathered(need, x).mean_abs, x.abs().mean(0))
    for need in GATHERED[1:]:
        torch.testing.assert_close(gathered(need, x).mean_square, x.square().mean(0))


def test_a_row_counts_as_much_as_its_weight_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 10, 6, generator=generator), torch.rand(4, 10, generator=generator)
    stats = Stats(6, Need.HESSIAN)
    for part, share in zip(x, weight, strict=True):
        stats.add(part, share)
    rows, shares = x.reshape(-1, 6), weight.reshape(-1, 1) / weight.sum()
    torch.testing.assert_close(stats.hessian, (rows * shares).T @ rows)
    torch.testing.assert_close(stats.mean_abs, (rows.abs() * shares).sum(0))
    assert stats.rows == 40


def test_the_largest_input_is_kept() -> None:
    stats, other = Stats(4, Need.MEAN_SQUARE), Stats(4, Need.MEAN_SQUARE)
    stats.add(torch.tensor([[1.0, -5.0, 2.0, 0.0], [3.0, 1.0, 1.0, 1.0]]))
    assert stats.largest == 5
    assert stats.divided(torch.tensor([1.0, 5.0, 0.5, 1.0])).largest == 4
    stats.add(torch.tensor([[torch.inf, 9.0, 9.0, 9.0]]))  # dropped
    assert stats.largest == 5
    other.shrink(stats, 4.0)
    assert other.largest == 5
    with pytest.raises(NumericsError, match="not gathered"):
        _ = Stats.from_mean_square(torch.ones(4), 1).largest
