"""Charts: round ticks, the Pareto front by its definition, names that cover nothing."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.report.charts.axis import Measure, axis, linear_ticks, log_ticks
from fewbit.report.charts.heat import heat, in_blocks, shades
from fewbit.report.charts.labels import Box, placed
from fewbit.report.charts.scatter import Point, front, scatter
from fewbit.report.charts.svg import standalone

LESS = Measure("bytes", "{:g}".format, log=True)
MORE = Measure("speed", "{:g}".format, more_is_better=True)

positive = st.floats(1e-6, 1e12)


@given(positive, st.floats(1.01, 1e4))
def test_linear_ticks_hold_the_range_and_are_few(low: float, factor: float) -> None:
    ticks = linear_ticks(low, low * factor)
    assert ticks[0] <= low * (1 + 1e-6)
    assert ticks[-1] >= low * factor * (1 - 1e-6)
    assert 3 <= len(ticks) <= 10
    assert list(ticks) == sorted(set(ticks))


@given(st.floats(1e-9, 1e3), st.floats(12, 1e9))
def test_log_ticks_are_round_and_few(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 19
    assert all(low <= tick <= low * factor and f"{tick:e}"[0] in "1235" for tick in ticks)


def test_zero_has_a_place_beside_a_logarithmic_axis() -> None:
    made = axis([0.0, 0.001, 1.0], 400, 0, log=True)
    assert made.log
    assert made.place(0.0) == 400
    assert made.place(0.001) < 370
    assert axis([0.0, 0.4, 1.0], 400, 0, log=True).log is False


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12), st.booleans())
def test_the_front_is_what_nothing_beats(values: list[tuple[int, int]], more: bool) -> None:
    points = [Point(str(i), x, y) for i, (x, y) in enumerate(values)]
    best = front(points, MORE if more else LESS, LESS)
    sign = -1 if more else 1
    for p in points:
        beaten = any(sign * q.x <= sign * p.x and q.y <= p.y and (sign * q.x < sign * p.x or q.y < p.y) for q in points)
        assert (p in best) is not beaten


def test_names_cover_neither_points_nor_one_another() -> None:
    points = [(100 + 14 * (i % 4), 100.0 + 12 * (i // 4)) for i in range(12)]
    room = Box(0, 0, 400, 300)
    boxes = placed(points, [(40, 12)] * 12, room, 4)
    for i, box in enumerate(boxes):
        assert box.shared(room) == pytest.approx(box.area)
        assert not any(box.shared(other) for other in boxes[i + 1 :])


def test_a_drawing_of_nothing_says_so() -> None:
    points = [Point("a", math.nan, 1.0), Point("b", 1.0, math.inf)]
    for given_points in ([], points):
        assert "nothing to show" in scatter(given_points, LESS, LESS, name="n", title="t")


@pytest.mark.parametrize("points", [[Point("a", 1, 0)], [Point("a", 1, 1)] * 2, [Point("a", 0, 0), Point("b", 0, 5)]])
def test_few_and_equal_points_are_drawn(points: list[Point]) -> None:
    drawn = scatter(points, LESS, LESS, name="n", title="t")
    assert drawn.count("<circle") == len(points)
    assert "nan" not in drawn


def test_markup_in_names_is_text() -> None:
    drawn = standalone(scatter([Point("<script>&\x01", 1, 1)], LESS, LESS, name="n", title="</svg>"))
    assert "<script" not in drawn
    assert drawn.count("</svg>") == 1
    assert "\x01" not in drawn


def test_a_heat_map_has_a_patch_for_each_linear_of_each_block() -> None:
    cells, outside = in_blocks(
        {"model.layers.0.q": 1e-3, "model.layers.1.q": 1.0, "model.layers.1.o": 0.0, "head": 2.0}
    )
    assert outside == {"head": 2.0}
    drawn = heat(cells, shades(cells.values()), name="n", title="t")
    assert [drawn.count(f'class="{look}"') for look in ("h0", "h8", "none")] == [2, 1, 1]


TABLE = """\
| type | way | KL divergence | seconds | seconds |
|---|---|---|---|---|
| q4, large | `rtn` | **0.030** (0.028 to 0.032) | 1,200 | |
| | gptq | 0.02 | not measured | 7 |
"""


def test_bars_of_a_table_have_its_names_and_numbers() -> None:
    from site_charts import charts, with_charts

    assert charts(TABLE, ["KL divergence", "#4 as s"], ["type", "way"]) == [
        ("3", "KL divergence", [("q4, rtn", 0.03), ("q4, gptq", 0.02)]),
        ("4", "s", [("q4, rtn", 1200.0)]),
    ]
    assert charts(TABLE, ["#3"], ["columns"]) == [("3", "", [("KL divergence", 0.02), ("seconds", 7.0)])]
    with pytest.raises(SystemExit, match="wants 'KL'"):
        charts(TABLE, ["KL"], ["type"])
    page = f"Words.\n\n<!-- chart: KL divergence by way -->\n\n{TABLE}\n"
    drawn = with_charts(page)
    assert drawn.startswith("Words.\n\n<div")
    assert drawn.endswith(TABLE + "\n")
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths[1] / widths[0] == pytest.approx(0.02 / 0.03, rel=1e-3)
