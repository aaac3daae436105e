"""Heat maps as SVG by hand, each a figure of a page.py page with its numbers beside it.

The two sides of the scale are two hues that fade into the page: the same picture is right on white and on black, and lightness
alone tells how far a value is from the middle.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe_embed import charts, fields, page

LEVELS = 10  # shades on a side
RIGHT = 10  # of the map, in the units of its viewBox


@dataclasses.dataclass(frozen=True)
class Axis:
    """What stands below a map whose columns are stretches of something, instead of their names: (place, label) ascending, and a
    run's `marks` above it, as charts.lines has them. Places are in columns from the left edge."""

    ticks: Sequence[tuple[float, str]]
    marks: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    color: int = 0


def heat_map(
    value_RC: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    limit: float,
    title: str,
    low: str,
    high: str,
    note: str = "",
    shown: np.ndarray | None = None,
    wide: bool = False,
    axis: Axis | None = None,
) -> str:
    """A cell for each value: vermilion above 0 and blue below, the stronger the nearer to `limit` and -limit.

    `low` and `high` are words for the ends of the scale (low "": no value is below 0); `shown` are the numbers of the CSV, if
    not the values themselves. Cells of one shade are one path: a map of thousands stays small.
    """
    num_rows, num_columns = value_RC.shape
    names = max((len(name) for name in rows), default=0)
    scale = 2 if wide else 1
    left = min(14 + 6.2 * names, 150 * scale)
    across = page.WIDTH * scale - left - (60 if wide else RIGHT)  # room for the last tilted names
    down = float(np.clip(across / num_columns, 300 / num_rows, 18)) if num_rows <= 24 else max(420 / num_rows, 1.5)
    down, width = min(down, 22.0), across / num_columns
    gap = 0.8 if min(width, down) > 5 else 0.0
    tilted = max(map(len, columns), default=0) * 6.2 > width and width > 9
    top = 8 + (min(max(map(len, columns)), 26) * 4.6 if tilted else 14)
    if axis:
        top = charts.TOP + (charts.LANE + 4 if any(axis.marks.values()) else 0)
    level_RC = np.clip(np.rint(LEVELS * value_RC / limit), -LEVELS, LEVELS).astype(int)
    parts = [f'<rect class="empty" x="{left:.1f}" y="{top:.1f}" width="{across:.1f}" height="{down * num_rows:.1f}"/>']
    for level in sorted(set(level_RC.ravel().tolist()) - {0}):
        path = "".join(
            f"M{left + width * c:.1f} {top + down * r:.1f}h{width * n - gap:.1f}v{down - gap:.1f}h{gap - width * n:.1f}z"
            for r, c, n in _stretches(level_RC == level, merge=gap == 0)
        )
        parts.append(
            f'<path style="fill:var(--c{int(level > 0)})" fill-opacity="{abs(level) / LEVELS:.2f}" d="{path}"/>'
        )
    every = max(1, math.ceil(11 / down))
    for r in range(0, num_rows, every):
        y = top + down * (r + 0.5) + 4
        parts.append(
            f'<text class="name" x="{left - 6:.1f}" y="{y:.1f}" text-anchor="end">{page.text(fields.cut(rows[r], int((left - 12) / 6)))}</text>'
        )
    every = 1 if tilted else max(1, math.ceil((8 + 6.5 * max(map(len, columns))) / width))
    for c in range(0, 0 if axis else num_columns, every):
        x, name = left + width * (c + 0.5), page.text(fields.cut(columns[c], 26))
        turn = (
            f' transform="rotate(-48 {x:.1f} {top - 5:.1f})" text-anchor="start"' if tilted else ' text-anchor="middle"'
        )
        parts.append(f'<text class="name" x="{x:.1f}" y="{top - 5:.1f}"{turn}>{name}</text>')
    bottom = top + down * num_rows + 12
    if axis:
        at_x = lambda place: left + width * place  # noqa: E731
        parts += charts.mark_shapes(axis.marks, at_x, lane=0, color=axis.color, top=top, height=down * num_rows)
        for x, label in charts.fitting([(at_x(place), label) for place, label in axis.ticks]):
            parts.append(f'<text x="{x:.1f}" y="{bottom + 3:.1f}" text-anchor="middle">{page.text(label)}</text>')
        bottom += 14
    parts.append(_scale(low, high, x=left, y=bottom))
    numbers = value_RC if shown is None else shown
    table = ([name, *map(float, of_row)] for name, of_row in zip(rows, numbers, strict=True))
    return page.figure(
        page.svg(parts, bottom + 20, title, width=page.WIDTH * scale), title=title, columns=["", *columns], rows=table, note=note,
        kind="map wide" if wide else "map", box=f"{left:.1f} {top:.1f} {across:.1f} {down * num_rows:.1f}",
    )  # fmt: skip


def _stretches(is_RC: np.ndarray, *, merge: bool) -> list[tuple[int, int, int]]:
    """(row, column, how many) of the cells that are True; neighbours in a row are one where `merge`."""
    found: list[tuple[int, int, int]] = []
    for r, c in np.argwhere(is_RC).tolist():
        if merge and found and found[-1][0] == r and found[-1][1] + found[-1][2] == c:
            found[-1] = (r, found[-1][1], found[-1][2] + 1)
        else:
            found.append((r, c, 1))
    return found


def _scale(low: str, high: str, *, x: float, y: float) -> str:
    """The shades of a heat map in a row, with a word at each end."""
    text = f'<text x="{x:.1f}" y="{y + 9:.1f}">{page.text(low)}</text>' if low else ""
    x += 6.3 * len(low) + (6 if low else 0)
    for i, level in enumerate(range(-LEVELS if low else 0, LEVELS + 1, 2)):
        paint = (
            f'style="fill:var(--c{int(level > 0)})" fill-opacity="{abs(level) / LEVELS:.2f}"'
            if level
            else 'class="empty"'
        )
        text += f'<rect x="{x + 11 * i:.1f}" y="{y:.1f}" width="10" height="10" {paint}/>'
    return text + f'<text x="{x + 11 * (i + 1) + 5:.1f}" y="{y + 9:.1f}">{page.text(high)}</text>'
