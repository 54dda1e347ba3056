"""The prediction of a KL divergence goes through the points that were measured."""

from __future__ import annotations

import math

import pytest

from fewbit.plans.correction import Correction


def test_it_recovers_a_power_law() -> None:
    points = [(total, 1.7 * total**1.2) for total in (0.02, 0.3, 0.07)]
    found = Correction.of(points)
    assert found.factor == pytest.approx(1.7)
    assert found.exponent == pytest.approx(1.2)
    assert found(0.15) == pytest.approx(1.7 * 0.15**1.2)
    assert found(1.0) == pytest.approx(1.7)


def test_below_the_smallest_point_the_ratio_stays() -> None:
    found = Correction.of([(0.02, 0.024), (0.2, 0.4)])
    assert found(0.02) == pytest.approx(0.024)
    assert found(0.0002) == pytest.approx(0.00024)
    assert found(0.0) == 0.0


@pytest.mark.parametrize(
    ("points", "ratio"),
    [
        ([], 1.0),
        ([(0.0, 0.1), (0.1, 0.0), (0.1, math.nan)], 1.0),
        ([(0.1, 0.15)], 1.5),
        ([(0.1, 0.12), (0.1, 0.27)], 1.8),  # one sum twice: the mean ratio
        ([(0.1, 0.2), (0.1001, 0.1)], math.sqrt(2.0 * 0.1 / 0.1001)),  # noise, no curve
    ],
)
def test_points_without_a_curve_give_a_ratio(points: list[tuple[float, float]], ratio: float) -> None:
    found = Correction.of(points)
    assert found.exponent == 1.0
    assert found(0.5) == pytest.approx(0.5 * ratio)
