"""Curves and bars: where a point lies, what a long curve keeps, and which numbers the link has."""

import itertools
import re

import numpy as np
import pytest

from moe_embed import charts
from moe_embed.charts import Line
from tests.test_page import Read, read_link


def attributes(figure: str, tag: str) -> list[dict]:
    return [attrs for name, attrs, _ in Read(figure).elements if name == tag]


def numbers(figure: str) -> list[list[str]]:
    (link,) = [attrs["href"] for attrs in attributes(figure, "a")]
    return read_link(link)


def test_a_point_lies_where_it_should():
    made = charts.lines([Line("a", [0, 10, 20], [0.0, 1.0, 4.0])], title="t", x_label="step")
    (curve,) = attributes(made, "polyline")
    left, top, width, height = map(float, attributes(made, "figure")[0]["data-box"].split())
    points = [tuple(map(float, point.split(","))) for point in curve["points"].split()]
    assert points == [(left, top + height), (left + width / 2, top + height * 3 / 4), (left + width, top)]
    assert numbers(made) == [["step", "a"], ["0", "0"], ["10", "1"], ["20", "4"]]
    other = charts.lines([Line("a", [0, 10, 20], [0.0, 2.0, 4.0])], title="t", x_label="step")
    assert attributes(other, "polyline") != [curve]


def test_two_runs_share_a_frame_and_their_numbers_a_table():
    made = charts.lines(
        [Line("a", [0, 1], [1.0, 2.0]), Line("b", [1, 2], [3.0, 4.0], color=1, dashed=True)], title="t", x_label="step"
    )
    assert numbers(made) == [["step", "a", "b"], ["0", "1", ""], ["1", "2", "3"], ["2", "", "4"]]
    assert [attrs["class"] for attrs in attributes(made, "polyline")] == ["curve", "curve second"]
    assert len({attrs["style"] for attrs in attributes(made, "polyline")}) == 2


def test_what_is_not_finite_is_left_out_and_nothing_draws_nothing():
    made = charts.lines([Line("a", [0, 1, 2], [1.0, np.nan, np.inf])], title="t", x_label="step")
    assert numbers(made) == [["step", "a"], ["0", "1"]]
    assert "nan" not in made
    assert len(attributes(made, "circle")) == 1
    assert (
        charts.lines([Line("a", [0], [np.nan])], title="t", x_label="step")
        == charts.lines([], title="t", x_label="step")
        == ""
    )


def test_marks_have_shapes_and_a_lane_a_run():
    curve = [Line("a", [0, 50], [1.0, 2.0])]
    marks = [{"save": [10, 50], "resume": [10]}, {"skipped": [20], "evaluation": [20]}]
    made = charts.lines(curve, title="t", x_label="step", marks=marks)
    drawn = [(a["d"], a["transform"]) for a in attributes(made, "path") if "transform" in a]
    assert [shape for shape, _ in drawn] == [
        charts.SHAPES[name] for name in ("save", "save", "resume", "skipped", "evaluation")
    ]
    heights = [int(place.rstrip(")").split()[1]) for _, place in drawn]
    assert heights[0] == heights[1] == heights[2] < heights[4] < heights[3]
    assert drawn[0][1] == drawn[2][1] != drawn[1][1]
    many = charts.lines(curve, title="t", x_label="step", marks=[{"save": [i / 1000 for i in range(50_000)]}])
    assert 20 < len(attributes(many, "path")) < charts.page.WIDTH / charts.APART + 10


def test_from_the_eighth_on_colors_come_again():
    """The page defines no more of them."""
    curves = [Line(str(i), [0, 1], [1.0, 2.0], color=i) for i in range(9)]
    made = charts.lines(curves, title="t", x_label="step", marks=[{"save": [1], "skipped": [0]}] * 9)
    made += charts.bars(np.ones((1, 9)), rows=["x"], series=[str(i) for i in range(9)], title="t")
    assert set(map(int, re.findall(r"var\(--c(\d+)\)", made))) == set(range(len(charts.page.COLORS)))


def test_a_long_curve_is_a_mean_in_a_band():
    y = np.sin(np.arange(100_000.0))
    y[77_777], y[12_345] = 9.0, -9.0
    x, low, mean, high = charts.thin(np.arange(100_000), y)
    assert len(x) == charts.BUCKETS
    assert (high.max(), low.min(), x[0]) == (9.0, -9.0, 0)
    place = int(high.argmax())
    part = np.array_split(y, charts.BUCKETS)[place]
    assert (low[place], mean[place], high[place]) == (part.min(), part.mean(), 9.0)
    assert x[place] <= 77_777 < x[place + 1]
    made = charts.lines([Line("a", range(100_000), y)], title="t", x_label="step")
    assert numbers(made)[0] == ["step", "a", "a, least", "a, greatest"]
    assert len(numbers(made)) == 1 + charts.BUCKETS
    assert len(attributes(made, "polygon")) == 1
    x, low, mean, high = charts.thin([1, 2, 3, 4], [5.0, 6.0, np.nan, 7.0])
    assert low is mean is high
    assert (list(x), list(mean)) == ([1, 2, 4], [5, 6, 7])


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 0),
        (-3.2, 7),
        (1e-6, 2e-6),
        (5, 5),
        (0, 1e9),
        (0.99, 1.0),
        (-5, -5),
        (1e-300, 2.0),
        (0, 3e-13),
        (1e-20, 1e-20),
        (2e-300, 9e-300),
    ],
)
def test_ticks_span_the_values(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-9 * abs(low)
    assert len({round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}) == 1
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))


@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 2), (0, 45), (0, 600), (0, 603), (17, 90), (0, 123_456)])
def test_steps_are_round_and_end_with_the_last(first, end):
    *round_steps, last = charts.steps(first, end)
    assert last == end
    assert first <= round_steps[0] if round_steps else first > 0
    assert len({b - a for a, b in itertools.pairwise(round_steps)}) <= 1
    assert all(step % (round_steps[1] - round_steps[0]) == 0 for step in round_steps[:1] if len(round_steps) > 1)
    assert 2 <= len(charts.steps(first, end)) <= 9


def test_labels_that_would_run_into_each_other_make_room_for_the_last():
    places = [(0.0, "0"), (50.0, "100"), (55.0, "110"), (100.0, "200"), (110.0, "212")]
    assert charts.fitting(places) == [places[0], places[1], places[4]]
    assert charts.fitting(places[:1]) == places[:1]


def test_a_scale_does_not_go_where_values_cannot():
    assert charts.ticks(0, 0)[0] == 0
    assert charts.ticks(0, 0, share=True) == charts.ticks(0, 1)
    assert charts.ticks(1, 1)[-1] > 1 == charts.ticks(1, 1, share=True)[-1]
    assert charts.ticks(-5, -5)[-1] > -5
    flat = charts.lines([Line("a", [0, 1], [0.0, 0.0])], title="t", x_label="step")
    assert ">-" not in flat
    full = [
        charts.lines([Line("a", [0, 1], [1.0, 1.0])], title="t", x_label="step", share=share) for share in (False, True)
    ]
    assert [">1.2</text>" in made or ">1.25</text>" in made for made in full] == [True, False]


def test_a_tiny_curve_and_a_run_of_one_step_are_drawn():
    made = charts.lines([Line("a", [0, 1], [1e-14, 3e-14])], title="t", x_label="step")
    assert len({point.split(",")[1] for point in attributes(made, "polyline")[0]["points"].split()}) == 2
    made = charts.lines([Line("a", [7], [0.3])], title="t", x_label="step")
    (point,) = attributes(made, "circle")
    labels = [attrs["x"] for attrs in attributes(made, "text") if attrs["text-anchor"] == "middle"]
    assert labels == [point["cx"]]
    assert ">7</text>" in made


def test_powers_of_two_are_as_far_apart():
    made = charts.lines([Line("a", [4, 8, 16], [1.0, 2.0, 3.0], points=True)], title="t", x_label="numbers", log_x=True)
    x = [float(attrs["cx"]) for attrs in attributes(made, "circle")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert [row[0] for row in numbers(made)[1:]] == ["4", "8", "16"]


def test_bars_are_as_long_as_their_values():
    made = charts.bars(np.array([[0.5, 0.25], [1.0, 0.0]]), rows=["x", "y & z"], series=["a", "b"], title="t", share=True,
                       intervals=np.array([[[0.4, 0.6], [0.2, 0.3]], [[0.9, 1.0], [0.0, 0.1]]]))  # fmt: skip
    widths = [float(attrs["width"]) for attrs in attributes(made, "rect")]
    assert widths == pytest.approx([widths[2] / 2, widths[2] / 4, widths[2], 0], abs=0.1)
    assert numbers(made)[0] == ["", "a", "b", "a, low", "a, high", "b, low", "b, high"]
    assert numbers(made)[1] == ["x", "0.5", "0.25", "0.4", "0.6", "0.2", "0.3"]
    assert len(re.findall('class="whisker"', made)) == 4
