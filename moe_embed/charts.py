"""Line charts and bars as SVG by hand, each a figure of a page.py page with its numbers beside it.

Colour is never alone: a second run's curves are dashed, and marks have shapes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_embed import fields, page

LEFT, RIGHT = 52, 12  # of a chart, in the units of its viewBox
HEIGHT, TOP, LANE, BOTTOM = 150, 8, 19, 34
BUCKETS = 220  # stretches of a curve of many points: drawn as a mean, in a band from its least to its greatest
DOTS = 40  # a curve of more points has none
APART = 7  # between marks of a kind
SHAPES = {"save": "M0-4L4 3H-4Z", "resume": "M0-5L5 0L0 5L-5 0Z", "skipped": "M-3.5-3.5L3.5 3.5M-3.5 3.5L3.5-3.5",
          "evaluation": "M-3 0A3 3 0 1 0 3 0A3 3 0 1 0-3 0Z"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: x ascending, y of the same length; what is not finite in y is left out. `color` is an index into COLORS."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dashed: bool = False
    points: bool = False  # a dot at each point


def lines(
    series: Sequence[Line],
    *,
    title: str,
    x_label: str,
    note: str = "",
    marks: Sequence[Mapping[str, Sequence[float]]] = (),
    log_x: bool = False,
    share: bool = False,
) -> str:
    """Curves in one frame. `marks`: for each run, a name of SHAPES -> where on x; they stand above the frame, a lane a run, evaluations over the others.

    `log_x` puts x on a scale of powers of two, with a tick at each x. `share`: y is within 0 and 1, and so is its scale.
    "" where no curve has a finite point.
    """
    drawn = [(line, *thin(line.x, line.y)) for line in series]
    drawn = [(line, x, low, mean, high) for line, x, low, mean, high in drawn if len(x)]
    if not drawn:
        return ""
    scaled = np.log2 if log_x else np.asarray
    all_x, all_y = np.concatenate([of[1] for of in drawn]), np.concatenate([y for of in drawn for y in (of[2], of[4])])
    marked = [x for of_run in marks for places in of_run.values() for x in places]
    x_from, x_to = (float(end([*scaled(all_x), *marked])) for end in (min, max))
    y_ticks = ticks(float(all_y.min()), float(all_y.max()), share=share)
    y_from, y_to = y_ticks[0], y_ticks[-1]
    top = TOP + (LANE * len(marks) + 4 if marked else 0)
    across = page.WIDTH - LEFT - RIGHT
    at_x = lambda x: LEFT + across * ((scaled(x) - x_from) / (x_to - x_from) if x_to > x_from else 0 * scaled(x) + 0.5)  # noqa: E731
    at_y = lambda y: top + HEIGHT * (1 - (y - y_from) / (y_to - y_from))  # noqa: E731
    parts = [
        f'<path class="grid-line" d="M{LEFT} {at_y(y):.1f}h{across}"/><text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{short(y)}</text>'
        for y in y_ticks
    ]
    within = [x for x in ticks(x_from, x_to) if x_from <= x <= x_to]
    round_x = within if x_from < x_to else [x_from]  # of a run of one step, which is seldom a round number
    x_ticks = sorted(set(all_x.tolist())) if log_x else round_x
    for place, x in _apart([(float(at_x(x)), x) for x in x_ticks], 24):  # nearer, the numbers run into each other
        parts.append(f'<text x="{place:.1f}" y="{top + HEIGHT + 15}" text-anchor="middle">{short(x)}</text>')
    parts.append(
        f'<text x="{page.WIDTH - RIGHT}" y="{top + HEIGHT + 30}" text-anchor="end">{page.text(x_label)}</text>'
    )
    for lane, of_run in enumerate(marks):
        parts += mark_shapes(of_run, at_x, lane=lane, color=lane, top=top, height=HEIGHT)
    for line, x, low, mean, high in drawn:
        parts += _curve(line, at_x(x), *map(at_y, (low, mean, high)), banded=low is not mean)
    parts.append(f'<line class="hair" x1="{LEFT}" x2="{LEFT}" y1="{top}" y2="{top + HEIGHT}"/>')
    bottom = top + HEIGHT + BOTTOM
    if len(drawn) > 1:
        legend, bottom = _legend([of[0] for of in drawn], bottom + 8)
        parts.append(legend)
    columns, rows = _numbers(drawn, x_label)
    return page.figure(
        page.svg(parts, bottom, title), title=title, columns=columns, rows=rows, note=note, kind="lines",
        box=f"{LEFT} {top} {across} {HEIGHT}", x=f"{x_from:.9g} {x_to:.9g} {int(log_x)}",
    )  # fmt: skip


def mark_shapes(
    marks: Mapping[str, Sequence[float]], at_x: Callable, *, lane: int, color: int, top: float, height: float
) -> list[str]:
    """Shapes of a run's marks in its lane above a frame that begins at `top`; a resume has a line through the frame."""
    parts = []
    for name, places in marks.items():
        where = [x for x, _ in _apart([(float(at_x(x)), x) for x in sorted(places)], APART)]
        fill = "none" if name == "skipped" else _color(color)
        y = LANE * lane + (6 if name == "evaluation" else 16)
        parts += [
            f'<path d="{SHAPES[name]}" transform="translate({x:.0f} {y})" style="fill:{fill};stroke:{_color(color)}"/>'
            for x in where
        ]
        if name == "resume":
            parts += [f'<path class="hair shown" d="M{x:.0f} {top:.1f}v{height:.1f}"/>' for x in where]
    return parts


def steps(first: int, end: int) -> list[int]:
    """Round steps from the first to the end, and the end itself, round or not.

    >>> steps(0, 45), steps(0, 1)
    ([0, 10, 20, 30, 40, 45], [0, 1])
    """
    return [*(int(x) for x in ticks(first, end) if x % 1 == 0 and first <= x < end), end]


def fitting(places: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Of labels at ascending places those that do not run into each other; the last is always among them."""
    least = 8 + 6.2 * max(len(label) for _, label in places)
    return [place for place in _apart(places[:-1], least) if places[-1][0] - place[0] >= least] + [places[-1]]


def _color(number: int) -> str:
    return f"var(--c{number % len(page.COLORS)})"  # from the eighth on they come again


def _curve(
    line: Line, x: np.ndarray, low: np.ndarray, mean: np.ndarray, high: np.ndarray, *, banded: bool
) -> list[str]:
    """Shapes of a curve whose points lie at these places of the picture."""
    parts, color = [], _color(line.color)
    points = lambda x, y: " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))  # noqa: E731
    if banded:
        band = points(np.r_[x, x[::-1]], np.r_[low, high[::-1]])
        parts.append(f'<polygon style="fill:{color}" fill-opacity="0.22" points="{band}"/>')
    if len(x) > 1:
        second = " second" if line.dashed else ""
        parts.append(f'<polyline class="curve{second}" style="stroke:{color}" points="{points(x, mean)}"/>')
    if (line.points and len(x) <= DOTS) or len(x) == 1:
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" style="fill:{color}"/>' for a, b in zip(x, mean, strict=True)
        ]
    return parts


def _numbers(drawn: Sequence[tuple], x_label: str) -> tuple[list[str], list[list]]:
    """Columns and rows of the curves' CSV: all x that any curve has, with an empty cell where another has none."""
    columns, cells = [x_label], {x: {} for x in sorted({float(x) for of in drawn for x in of[1]})}
    for line, x, low, mean, high in drawn:
        named = {line.name: mean}
        if low is not mean:
            named |= {f"{line.name}, least": low, f"{line.name}, greatest": high}
        for name, y in named.items():
            columns.append(name)
            for at, value in zip(x.tolist(), y.tolist(), strict=True):
                cells[at][name] = value
    return columns, [
        [x if x % 1 else int(x), *(of[name] if name in of else None for name in columns[1:])] for x, of in cells.items()
    ]


def bars(
    value_RS: np.ndarray,
    *,
    rows: Sequence[str],
    series: Sequence[str],
    title: str,
    note: str = "",
    intervals: np.ndarray | None = None,
    share: bool = False,
    colors: Sequence[int] = (),
) -> str:
    """A group of lying bars for each row, one of each series; values are 0 or above, `intervals` [R, S, 2] a whisker each.

    `share` ends the scale at 1. `colors` are the series', else they have the first ones.
    """
    colors = colors or range(len(series))
    num_rows, num_series = value_RS.shape
    left, thick = min(16 + 6.2 * max(map(len, rows)), 210), 13
    across, each = page.WIDTH - left - 34, thick * num_series + 8
    most = 1.0 if share else float(max(value_RS.max(), 0 if intervals is None else intervals.max())) or 1.0
    parts = [f'<path class="grid-line" d="M{left:.1f} 4v{each * num_rows}"/>']
    for r in range(num_rows):
        y = 8 + each * r
        name = page.text(fields.cut(rows[r], int((left - 12) / 6)))
        parts.append(
            f'<text class="name" x="{left - 6:.1f}" y="{y + (each - 8) / 2 + 4:.1f}" text-anchor="end">{name}</text>'
        )
        for i in range(num_series):
            width, middle = across * value_RS[r, i] / most, y + thick * (i + 0.5)
            end = width
            parts.append(
                f'<rect x="{left:.1f}" y="{y + thick * i}" width="{width:.1f}" height="{thick - 2}" style="fill:{_color(colors[i])}"/>'
            )
            if intervals is not None:
                low, end = (across * float(x) / most for x in intervals[r, i])
                parts.append(f'<path class="whisker" d="M{left + low:.1f} {middle - 1:.1f}H{left + end:.1f}"/>')
            parts.append(f'<text x="{left + max(width, end) + 5:.1f}" y="{middle + 3:.1f}">{value_RS[r, i]:.3g}</text>')
    bottom = 12 + each * num_rows
    if num_series > 1:
        legend, bottom = _legend(
            [Line(name, (), (), color=color) for color, name in zip(colors, series, strict=True)], bottom + 12
        )
        parts.append(legend)
    columns, numbers = ["", *series], [[name, *map(float, of_row)] for name, of_row in zip(rows, value_RS, strict=True)]
    if intervals is not None:
        columns += [f"{name}, {end}" for name in series for end in ("low", "high")]
        numbers = [[*row, *map(float, of_row.ravel())] for row, of_row in zip(numbers, intervals, strict=True)]
    return page.figure(page.svg(parts, bottom, title), title=title, columns=columns, rows=numbers, note=note)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The finite points of a curve: (x, least, mean, greatest), each [n]; of a curve of few points the three are one array.

    More than 2 BUCKETS of points become BUCKETS stretches, each at its first x, and nothing that stuck out is lost.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) <= 2 * BUCKETS:
        return x, y, y, y
    parts = np.array_split(y, BUCKETS)
    low, mean, high = (np.array([of(part) for part in parts]) for of in (np.min, np.mean, np.max))
    return np.array([part[0] for part in np.array_split(x, BUCKETS)]), low, mean, high


def ticks(low: float, high: float, *, share: bool = False) -> list[float]:
    """Four to seven round numbers that span low to high; of one value alone some to both sides, of a share none beyond 0 and 1.

    None lies below 0 where no value does: most of what is drawn cannot be negative.

    >>> ticks(0.3, 3.9)
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        most = max(1.0, high) if share else np.inf
        low, high = low - abs(low) / 2, min(high + (abs(high) / 2 or 1.0), most)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(
        power * k for k in (1, 2, 2.5, 5, 10) if math.ceil(high / (power * k)) - math.floor(low / (power * k)) <= 6
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))  # a step has one or two: the rest is noise of the product
    return [round(step * k, digits) for k in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: 52k, 1.5M, 0.004, 2e-05.

    >>> short(52_000), short(0.25), short(12.0)
    ('52k', '0.25', '12')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _apart(places: Sequence[tuple], least: float) -> list[tuple]:
    """Of (place, anything), ascending, those that are `least` apart: what would lie on each other is one."""
    found: list[tuple] = []
    for place in places:
        if not found or place[0] - found[-1][0] >= least:
            found.append(place)
    return found


def _legend(series: Sequence[Line], y: float) -> tuple[str, float]:
    """Names of the curves in rows below the frame, and where the picture ends."""
    text, x = "", float(LEFT)
    y += 4
    for line in series:
        width = 38 + 6.2 * len(line.name)
        if x > LEFT and x + width > page.WIDTH:
            x, y = float(LEFT), y + 16
        dash = ' class="second"' if line.dashed else ""
        dot = f'<circle cx="{x + 8:.0f}" cy="{y - 4:.0f}" r="3.2" style="fill:{_color(line.color)}"/>'
        stroke = f'<path{dash} style="stroke:{_color(line.color)};stroke-width:2" d="M{x:.0f} {y - 4:.0f}h16"/>'
        text += (
            dot if len(line.x) == 1 else stroke
        ) + f'<text class="name" x="{x + 21:.0f}" y="{y:.0f}">{page.text(line.name)}</text>'
        x += width
    return text, y + 8
