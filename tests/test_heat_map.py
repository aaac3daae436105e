"""Heat maps: a colour for each side, a shade for each size, one path a shade."""

import re

import numpy as np
import pytest

from moe_embed import charts, heat_map
from tests.test_charts import attributes, numbers


def cells(figure: str) -> dict[tuple[str, str], int]:
    """(colour, opacity) -> cells, or stretches of them."""
    return {(a["style"], a["fill-opacity"]): a["d"].count("M") for a in attributes(figure, "path")}


def draw(value_RC, **options):
    rows, columns = ([f"{letter}{i}" for i in range(n)] for letter, n in zip("rc", value_RC.shape, strict=True))
    return heat_map.heat_map(
        value_RC, rows=rows, columns=columns, limit=1.0, title="t", low="less", high="more", **options
    )


def test_two_sides_and_their_shades():
    made = draw(np.array([[1.0, -1.0, 0.0], [0.5, 9.0, -0.2]]))
    assert cells(made) == {
        ("fill:var(--c0)", "1.00"): 1, ("fill:var(--c0)", "0.20"): 1, ("fill:var(--c1)", "0.50"): 1, ("fill:var(--c1)", "1.00"): 2,
    }  # fmt: skip
    assert cells(made) != cells(draw(np.array([[1.0, 1.0, 0.0], [0.5, 9.0, -0.2]])))
    assert numbers(made) == [["", "c0", "c1", "c2"], ["r0", "1", "-1", "0"], ["r1", "0.5", "9", "-0.2"]]
    assert numbers(draw(np.zeros((1, 1)), shown=np.array([[7.0]])))[1] == ["r0", "7"]


def test_a_cell_lies_in_its_row_and_column():
    value = np.zeros((4, 5))
    value[2, 3] = 1.0
    made = draw(value)
    left, top, width, height = map(float, attributes(made, "figure")[0]["data-box"].split())
    (path,) = attributes(made, "path")
    x, y = map(float, re.match(r"M([\d.]+) ([\d.]+)h", path["d"]).groups())
    assert abs(x - (left + width * 3 / 5)) < 0.1
    assert abs(y - (top + height * 2 / 4)) < 0.1


def test_an_axis_stands_below_instead_of_the_columns_names():
    axis = heat_map.Axis([(0, "0"), (3, "30"), (5, "45")], {"save": [5], "resume": [2.5]}, color=3)
    made = draw(np.ones((2, 5)), axis=axis)
    left, top, width, height = map(float, attributes(made, "figure")[0]["data-box"].split())
    labels = [(float(a["x"]), float(a["y"])) for a in attributes(made, "text") if a.get("text-anchor") == "middle"]
    assert [x for x, _ in labels] == pytest.approx([left, left + width * 3 / 5, left + width], abs=0.1)
    assert all(y > top + height for _, y in labels)
    marks = [a for a in attributes(made, "path") if "transform" in a]
    assert [a["d"] for a in marks] == [charts.SHAPES["save"], charts.SHAPES["resume"]]
    assert all("--c3" in a["style"] for a in marks)
    assert ">c0</text>" not in made
    assert ">c0</text>" in draw(np.ones((2, 5)))


def test_thousands_of_cells_stay_small():
    rng = np.random.default_rng(0)
    made = draw(rng.uniform(-1, 1, (64, 96)))
    assert len(attributes(made, "path")) <= 2 * heat_map.LEVELS
    assert len(made) < 64 * 96 * 40
    even = draw(np.ones((64, 96)))
    assert cells(even) == {("fill:var(--c1)", "1.00"): 64}  # neighbours of one shade are one stretch
